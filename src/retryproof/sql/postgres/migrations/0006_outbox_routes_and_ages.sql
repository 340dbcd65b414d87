-- When a message is given up (rule T6), and which relays may share an outbox.
--
-- failed_at: when it failed first, or its relay died over it; µs by the server's clock. answers: how often its receiver
-- answered about the message itself. deaths: how many relays died while they sent it alone (C15). attempts stays the
-- number of all failures, after which the pauses go.
ALTER TABLE retryproof_outbox ADD COLUMN failed_at bigint;
ALTER TABLE retryproof_outbox ADD COLUMN answers integer NOT NULL DEFAULT 0;
ALTER TABLE retryproof_outbox ADD COLUMN deaths integer NOT NULL DEFAULT 0;

-- A digest of where a relay sends which topics; none of a relay of an earlier release, which nobody else joins.
ALTER TABLE retryproof_outbox_relays ADD COLUMN routes text;
