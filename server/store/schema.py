"""The tables of the ledger.

What must hold is in the tables' own constraints, so that no caller can break it: an update is merged by one
version at most, versions follow one another without a gap, an update that waits has its bytes.
"""

SCHEMA_VERSION = 1

SCHEMA = (
    """
    CREATE TABLE meta (
        key TEXT PRIMARY KEY,
        value TEXT NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE versions (
        number INTEGER PRIMARY KEY CHECK (number >= 0),
        kind TEXT NOT NULL CHECK (kind IN ('base', 'merge', 'rollback', 'removal')),
        parent INTEGER NOT NULL REFERENCES versions (number),
        at REAL NOT NULL,
        "update" TEXT NOT NULL,
        task TEXT NOT NULL,
        site TEXT NOT NULL,
        examples INTEGER NOT NULL CHECK (examples >= 0),
        merges INTEGER NOT NULL CHECK (merges >= 0),
        norm_sum REAL NOT NULL,
        update_norm REAL NOT NULL,
        state_norm REAL NOT NULL,
        scale REAL NOT NULL,
        lambda_t REAL NOT NULL,
        merged_norm REAL NOT NULL,
        sha256 TEXT NOT NULL CHECK (length(sha256) IN (0, 64)),
        size INTEGER NOT NULL CHECK (size >= 0),
        kept INTEGER NOT NULL CHECK (kept IN (0, 1)),
        snapshot TEXT NOT NULL CHECK (length(snapshot) IN (0, 64)),
        snapshot_size INTEGER NOT NULL DEFAULT 0 CHECK (snapshot_size >= 0),
        seconds REAL NOT NULL,
        "by" TEXT NOT NULL,
        CONSTRAINT the_base_is_version_0 CHECK ((kind = 'base') = (number = 0)),
        CONSTRAINT a_parent_is_older CHECK (parent < number OR number = 0),
        CONSTRAINT a_merge_has_an_update CHECK (kind <> 'merge' OR "update" <> '')
    ) STRICT
    """,
    """CREATE UNIQUE INDEX merged_once ON versions ("update") WHERE kind = 'merge'""",
    "CREATE INDEX versions_by_content ON versions (sha256) WHERE kept",
    "CREATE INDEX versions_by_snapshot ON versions (snapshot) WHERE snapshot <> ''",
    """
    CREATE TABLE updates (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE CHECK (length(id) = 32),
        site TEXT NOT NULL,
        task TEXT NOT NULL,
        state TEXT NOT NULL
            CHECK (state IN ('staged', 'held', 'merged', 'rejected', 'failed', 'removed')),
        sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
        size INTEGER NOT NULL CHECK (size >= 0),
        examples INTEGER NOT NULL CHECK (examples >= 1),
        origin_version INTEGER NOT NULL CHECK (origin_version >= 0),
        norm REAL NOT NULL CHECK (norm >= 0),
        at REAL NOT NULL,
        version INTEGER REFERENCES versions (number),
        reason TEXT NOT NULL DEFAULT '',
        kept INTEGER NOT NULL DEFAULT 1 CHECK (kept IN (0, 1)),
        CONSTRAINT a_merged_update_has_its_version
            CHECK ((version IS NOT NULL) = (state IN ('merged', 'removed'))),
        CONSTRAINT a_waiting_update_is_kept CHECK (kept OR state NOT IN ('staged', 'held'))
    ) STRICT
    """,
    "CREATE INDEX updates_by_state ON updates (state, seq)",
    "CREATE INDEX updates_by_content ON updates (sha256)",
    "CREATE INDEX updates_by_site ON updates (site, at, size)",
    """
    CREATE TABLE refusals (
        seq INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        site TEXT NOT NULL,
        task TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        size INTEGER NOT NULL,
        error TEXT NOT NULL,
        reason TEXT NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE refusal_counts (
        error TEXT PRIMARY KEY,
        count INTEGER NOT NULL CHECK (count >= 1)
    ) STRICT
    """,
    """
    CREATE TABLE acts (
        seq INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        who TEXT NOT NULL,
        what TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT
    """,
)
