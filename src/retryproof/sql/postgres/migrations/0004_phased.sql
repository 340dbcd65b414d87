-- The completer's worklist: phased operations that are under way (rule T3). A row is written with the first recovery
-- point and removed with the completion, so that nobody has to search the operations for those that were abandoned.
--
-- due_at: microseconds by the server's clock; until then somebody is at it. birth: of the record, so that a row
-- whose record has gone is not taken for another's. input: what the function is given, and for whom.
CREATE TABLE retryproof_phased (
    due_at bigint NOT NULL,
    listed_at bigint NOT NULL,
    tries integer NOT NULL DEFAULT 0,
    id bytea NOT NULL,
    birth bytea NOT NULL,
    fingerprint bytea NOT NULL,
    tenant bytea NOT NULL,
    function text NOT NULL,
    input bytea NOT NULL,
    reason text,
    CONSTRAINT retryproof_phased_pkey PRIMARY KEY (id)
);
CREATE INDEX retryproof_phased_due_at ON retryproof_phased (due_at);
