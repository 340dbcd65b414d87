-- Claims a batch, mirroring `decide` in core/record.py. ARGV: the number of terms; for each of them lease, retention,
-- unsettled retention, refuse (0, 1), max_attempts, alone; then a string with the place of each key's terms, from 0;
-- then for each key what a new record is from its nonce on. A reply is a new record's token where that is now; or the
-- record as it stands, acquired or finished; or
--   R microseconds   running      M fingerprint   mismatch      X reason attempt   abandoned      E   unreadable
local UNREADABLE = {'E'}

local function head(term, token, counts, first_seen, attempt, deaths)
  return pack(HEAD, FORMAT, IN_PROGRESS, term.expires_at, term.lease_until, counts, attempt, deaths, term.retention,
    first_seen, token)
end

local terms = {}
for i = 0, ARGV[1] - 1 do
  local at = 6 * i + 2
  local term = {
    lease_until = now + ARGV[at],
    retention = ARGV[at + 1],
    expires_at = now + ARGV[at + 2],
    refuse = ARGV[at + 3] == '1',
    max_attempts = tonumber(ARGV[at + 4]),
    alone = ARGV[at + 5],
  }
  term.counts = term.alone == '2' and 1 or 0
  term.fresh = head(term, now, term.counts, now, 1, 0)
  terms[i] = term
end

local wrote = false

-- Where there is none: SETNX, since an empty string is none of ours, and was read as if it were none.
local function be_born(key, born, term)
  if call('SETNX', key, term.fresh .. born) == 0 then
    return UNREADABLE
  end
  wrote = true
  return now
end

-- In the place of one that is over.
local function be_born_after(key, born, term, token)
  local record = head(term, math.max(token + 1, now), term.counts, now, 1, 0) .. born
  call('SET', key, record)
  wrote = true
  return record
end

-- What the record is from its nonce on under the nonce of another claim: the first one stays, as its birth.
local function reborn(record, nonce)
  local fingerprint, birth, tenant, trace = parse('<BBBI4', record, LENGTHS)
  if birth > 0 then
    return nonce .. sub(record, LENGTHS)
  end
  local at = NAMES + fingerprint
  return nonce .. pack('<BBBI4', fingerprint, 16, tenant, trace) .. sub(record, NAMES, at - 1)
    .. sub(record, NONCE, NONCE + 15) .. sub(record, at)
end

-- A record that is there and is not completed within its retention.
local function reclaim(key, born, term, record, hash, fingerprint)
  local _, state, expires_at, lease_until, counts, attempt, deaths, _, first_seen, token = parse(HEAD, record)
  if state ~= IN_PROGRESS and not unsettled(state, record) and now >= expires_at then
    return be_born_after(key, born, term, token)
  end
  if fingerprint then
    return {'M', fingerprint}
  end
  local nonce, new_counts = sub(born, 1, 16), term.counts
  local same = sub(record, NONCE, NONCE + 15) == nonce
  if state == IN_PROGRESS then
    if same then
      return whole(key, record, hash)
    end
    if lease_until > now then
      return {'R', lease_until - now}
    end
    if term.refuse then
      return {'X', 'refused', attempt}
    end
    deaths = deaths + counts
    if deaths >= term.max_attempts then
      return {'X', 'poisoned', attempt}
    end
    attempt = attempt + 1
    if term.alone ~= '0' then
      new_counts = 1
    end
  elseif same then
    return {'R', 0}
  elseif attempt > 1 and term.refuse then
    return {'X', 'refused', attempt}
  end
  record = head(term, math.max(token + 1, now), new_counts, first_seen, attempt, deaths)
    .. reborn(whole(key, record, hash), nonce)
  call('SET', key, record) -- and takes the TTL away
  wrote = true
  return record
end

-- What the next key is taken for: what the last one was. To write what is new saves reading that there is nothing.
local expect_new = true

local function decide(key, born, term)
  if expect_new then
    if pcall('SETNX', key, term.fresh .. born) == 1 then
      wrote = true
      return now
    end
  end
  local record, hash = read_start(key)
  expect_new = not record
  if not record then
    return be_born(key, born, term)
  end
  local state = state_of(record)
  if not state then
    return UNREADABLE
  end
  local size = byte(record, LENGTHS)
  local same = size == byte(born, 17) and find(record, sub(born, 24, 23 + size), NAMES, true) == NAMES
  if state >= COMPLETED and same and now < parse('<d', record, 3) then
    return whole(key, record, hash)
  end
  return reclaim(key, born, term, record, hash, not same and sub(record, NAMES, NAMES - 1 + size))
end

local replies = {}
local places = 6 * ARGV[1] + 2
for i, key in ipairs(KEYS) do
  replies[i] = decide(key, ARGV[places + i], terms[byte(ARGV[places], i)])
end
return not wrote and refused_by_a_replica() or replies
