"""The Arrow form of experience: one row per trained assistant turn, readable with pandas as it lies.

The same rows carry supervised examples: `response_ids` are then the wanted ids, `logprobs` and `rewards` stay empty.
Token columns are large_list: 32-bit list offsets overflow in big batches.

Sounds travel beside the rows, once per clip, as what the frozen encoder made of them (`STATES`).
"""

import pyarrow as pa

SCHEMA_VERSION = "3"

_version_span = pa.struct(
    [
        ("incarnation", pa.int32()),
        ("number", pa.int64()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("mixed", pa.bool_()),  # attended to keys and values of earlier weights: no version's own log-probabilities
    ]
)
_clip_span = pa.struct([("sha256", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
_spoken = pa.struct([("sha256", pa.string()), ("text", pa.string()), ("voice", pa.string()), ("heard", pa.string())])
_reward = pa.struct(
    [
        ("source", pa.string()),
        ("turn", pa.int32()),  # the row's own, or a later one that was not played
        ("value", pa.float32()),  # as the source gave it
        ("share", pa.float32()),  # normalised and weighted
        ("detail", pa.map_(pa.string(), pa.float32())),  # the source's parts, e.g. correct, format
    ]
)

EXPERIENCE = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("task", pa.string()),
        ("group", pa.int64()),  # siblings of one prompt share it; unique within a run
        ("sibling", pa.int32()),
        ("turn", pa.int32()),  # index over the record's user messages
        ("prompt_ids", pa.large_list(pa.int32())),  # audio placeholders expanded
        ("response_ids", pa.large_list(pa.int32())),  # exactly the sampled ids: the loss mask
        ("logprobs", pa.large_list(pa.float32())),  # nats, aligned with response_ids
        ("version_spans", pa.list_(_version_span)),  # cover response_ids
        ("clips", pa.list_(_clip_span)),  # placeholder spans of prompt_ids
        ("clip_targets", pa.list_(pa.large_list(pa.int32()))),  # supervised only: spoken word ids per clip, else empty
        ("rewards", pa.list_(_reward)),  # one entry per source and turn that it speaks of
        ("reward", pa.float32()),  # the sum of their shares
        ("thinking", pa.string()),  # null when the reasoning was never closed
        ("reply", pa.string()),
        ("finish_reason", pa.string()),
        ("generate_s", pa.float32()),
        ("judge_s", pa.float32()),
        ("spoken", _spoken),  # what it answers, where a simulated user improvised; else null
    ],
    metadata={"rlaudio.schema": SCHEMA_VERSION},
)

STATES = pa.schema(
    [
        ("sha256", pa.string()),  # as in the rows' clips; unique within a batch
        ("encoder", pa.string()),  # names the weights that made the states
        ("dtype", pa.string()),  # torch's name: Arrow has no bfloat16
        ("shape", pa.list_(pa.int64(), 2)),  # [S, width]
        ("data", pa.large_binary()),  # the states' bytes, row by row, little endian
    ],
    metadata={"rlaudio.schema": SCHEMA_VERSION},
)
