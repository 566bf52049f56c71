"""Makes kuberay.json from a checkout of KubeRay: `python trim_kuberay.py CHECKOUT > kuberay.json`."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

COMMENT = "RayCluster and RayJob (v1) of KubeRay's CustomResourceDefinitions; see README.md"


def without_descriptions(node: Any, *, names: bool = False) -> Any:
    """`names`: the keys of this mapping are a schema's properties, not its keywords."""
    if isinstance(node, list):
        return [without_descriptions(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: without_descriptions(value, names=key == "properties" and not names)
        for key, value in node.items()
        if names or key != "description"
    }


def shared(node: Any, defs: dict[str, Any], *, top: bool = False) -> Any:
    """Equal parts once, under `$defs`."""
    if isinstance(node, list):
        return [shared(item, defs) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: shared(value, defs) for key, value in node.items()}
    text = json.dumps(node, sort_keys=True)
    if top or len(text) < 300 or not isinstance(node.get("type"), str):
        return node
    name = hashlib.sha256(text.encode()).hexdigest()[:10]
    defs[name] = node
    return {"$ref": f"#/$defs/{name}"}


def main() -> None:
    folder = Path(sys.argv[1]) / "ray-operator" / "config" / "crd" / "bases"
    defs: dict[str, Any] = {}
    kinds = {}
    for file in ("ray.io_rayclusters.yaml", "ray.io_rayjobs.yaml"):
        definition = yaml.load((folder / file).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        (version,) = (one for one in definition["versions"] if one["name"] == "v1")
        schema = without_descriptions(version["schema"]["openAPIV3Schema"])
        kinds[definition["names"]["kind"]] = shared(schema, defs, top=True)
    json.dump({"$comment": COMMENT, "$defs": defs, **kinds}, sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
