-- Markers of callers' transactions (rule T1). A row is written when an operation joins a transaction and deleted by its
-- completion in that same transaction; so a row that anybody else can see says that the work was committed without it.
-- token: of the attempt. The table is nearly always empty, and its rows come and go: it is vacuumed by their number.
CREATE TABLE retryproof_markers (
    token bigint NOT NULL,
    id bytea NOT NULL,
    CONSTRAINT retryproof_markers_pkey PRIMARY KEY (id, token)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);
