-- The inbox (rule T4): one row for each message that a consumer has taken, written in the consumer's own transaction.
--
-- id: SHA-256 over consumer, source and message id. seen_at: microseconds by the server's clock, for purging.
-- result, outgoing: what the first run came to and sent, given again to a duplicate.
CREATE TABLE retryproof_inbox (
    seen_at bigint NOT NULL,
    id bytea NOT NULL,
    fingerprint bytea NOT NULL,
    result bytea,
    outgoing bytea,
    CONSTRAINT retryproof_inbox_pkey PRIMARY KEY (id)
);
CREATE INDEX retryproof_inbox_seen_at ON retryproof_inbox (seen_at);

-- Messages that came under an id which had been used with another payload, each once.
CREATE TABLE retryproof_inbox_dead (
    seen_at bigint NOT NULL,
    id bytea NOT NULL,
    fingerprint bytea NOT NULL,
    consumer text NOT NULL,
    source text NOT NULL,
    message_id text NOT NULL,
    reason text NOT NULL,
    payload bytea NOT NULL,
    CONSTRAINT retryproof_inbox_dead_pkey PRIMARY KEY (id, fingerprint)
);
