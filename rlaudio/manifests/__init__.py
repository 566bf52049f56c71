"""Manifests of clusters, sized from a run's configuration. `rlaudio cluster` prints them; `cluster/` holds examples."""
