"""The ledger's tables. What may not happen is refused by the database too, whoever writes to it."""

SCHEMA_VERSION = "1"

TRANSITIONS: dict[str, tuple[str, ...]] = {
    "issued": ("ready", "dropped", "reissued"),
    "ready": ("trained", "dropped", "reissued", "ready"),  # to itself: where a restart finds it so
    "trained": ("durable", "ready", "reissued"),  # the last two by a restore alone
    "durable": ("ready", "reissued"),  # where the checkpoint that covered it is lost
    "dropped": (),
    "reissued": (),
}
"""State of an issue -> what it may become."""

_STATES = ", ".join(f"'{state}'" for state in TRANSITIONS)
_LEGAL = " OR ".join(
    f"(OLD.state = '{old}' AND NEW.state IN ({', '.join(repr(state) for state in new)}))"
    for old, new in TRANSITIONS.items()
    if new
)

SCHEMA = f"""
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);

-- One row per process that ran the loop, with the weights that it began with: `number` of incarnation `parent`.
CREATE TABLE lives (
    incarnation INTEGER PRIMARY KEY, parent INTEGER NOT NULL, number INTEGER NOT NULL,
    step INTEGER NOT NULL,      -- batches that those weights were trained on
    began_s REAL NOT NULL,      -- unix time
    returned INTEGER NOT NULL,  -- groups that came back, ready or reissued
    undone INTEGER NOT NULL     -- of those, how many had been trained on after that step
);

-- One row per issue of a group. The last issue of every group is the one that counts.
CREATE TABLE issues (
    grp INTEGER NOT NULL, attempt INTEGER NOT NULL, prompt TEXT NOT NULL,
    incarnation INTEGER NOT NULL,  -- that issued it
    state TEXT NOT NULL CHECK (state IN ({_STATES})),
    reason TEXT NOT NULL DEFAULT '' CHECK ((reason <> '') = (state IN ('dropped', 'reissued'))),
    step INTEGER CHECK ((step IS NOT NULL) = (state IN ('trained', 'durable'))),
    place INTEGER,                 -- in the batch of that step
    life INTEGER, oldest INTEGER, newest INTEGER,  -- versions of its tokens: all of one incarnation
    file TEXT, sha256 TEXT, num_bytes INTEGER,     -- in the spool, while it is there
    PRIMARY KEY (grp, attempt)
) WITHOUT ROWID;
CREATE UNIQUE INDEX one_issue_counts ON issues (grp) WHERE state <> 'reissued';
CREATE UNIQUE INDEX one_place ON issues (step, place) WHERE step IS NOT NULL;
CREATE INDEX unfinished ON issues (grp) WHERE state IN ('issued', 'ready', 'trained');

CREATE TRIGGER legal BEFORE UPDATE OF state ON issues WHEN NOT ({_LEGAL})
BEGIN SELECT RAISE(ABORT, 'a group cannot go this way'); END;
CREATE TRIGGER kept BEFORE DELETE ON issues BEGIN SELECT RAISE(ABORT, 'issues are not deleted'); END;

-- What the loop said of each batch, beside what the issues say of themselves. A later life's word replaces none.
CREATE TABLE batches (
    step INTEGER NOT NULL, incarnation INTEGER NOT NULL, num_groups INTEGER NOT NULL,
    PRIMARY KEY (step, incarnation)
) WITHOUT ROWID;

INSERT INTO facts VALUES ('schema', '{SCHEMA_VERSION}');
INSERT INTO lives VALUES (0, 0, 0, 0, strftime('%s', 'now'), 0, 0);
"""
