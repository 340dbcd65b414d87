-- The record of core/record.py. Times and durations are microseconds (the server's clock, since the epoch).
--
-- Wide columns first, so that no row is padded. Free text (trace) is bytea: it may hold what the database's encoding
-- cannot. Checkpoints are {base64 name: base64 value}, NULL when there are none.
CREATE TABLE retryproof_operations (
    token bigint NOT NULL,
    first_seen bigint NOT NULL,
    lease_until bigint NOT NULL,
    expires_at bigint NOT NULL,
    retention bigint NOT NULL,
    attempt integer NOT NULL,
    deaths integer NOT NULL,
    state smallint NOT NULL CHECK (state BETWEEN 1 AND 4),
    counts boolean NOT NULL,
    id bytea NOT NULL,
    fingerprint bytea NOT NULL,
    birth bytea NOT NULL,
    nonce bytea NOT NULL,
    tenant bytea NOT NULL,
    trace bytea NOT NULL,
    result bytea,
    checkpoints jsonb,
    CONSTRAINT retryproof_operations_pkey PRIMARY KEY (id)
);

-- Results come encoded, often compressed or encrypted: no attempt to compress them again while a batch waits.
ALTER TABLE retryproof_operations ALTER COLUMN result SET STORAGE EXTERNAL;

-- For reaping. A renewal leaves expires_at alone, so it touches no index (HOT).
CREATE INDEX retryproof_operations_expires_at ON retryproof_operations (expires_at);

-- For listing and purging a tenant; an operation without one pays nothing.
CREATE INDEX retryproof_operations_tenant ON retryproof_operations (tenant, id) WHERE tenant <> ''::bytea;
