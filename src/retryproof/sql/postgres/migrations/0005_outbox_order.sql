-- The order of the outbox is the number alone (rules T5, T6): a transaction that saw another's commit before it added
-- has the higher number, and whoever sees its message sees the other's as well.
--
-- xid stays, and stays the first column: its default gives a transaction its id before a number is drawn, which the
-- floors of relays rest on. It and flight_xids serve relays of the release before, which may still be at work; without
-- their indexes they are slower, no more.
ALTER TABLE retryproof_outbox DROP CONSTRAINT retryproof_outbox_pkey;
ALTER TABLE retryproof_outbox ADD CONSTRAINT retryproof_outbox_pkey PRIMARY KEY (sequence);

-- sequence + 0, so that the planner cannot take the primary key for a partition's order.
DROP INDEX retryproof_outbox_ready;
DROP INDEX retryproof_outbox_parked;
CREATE INDEX retryproof_outbox_ready ON retryproof_outbox (partition, (sequence + 0)) WHERE NOT parked;
CREATE INDEX retryproof_outbox_parked ON retryproof_outbox (partition, chain, (sequence + 0)) WHERE parked;
