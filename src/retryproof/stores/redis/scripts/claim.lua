-- Claims a batch, mirroring `decide` in core/record.py. ARGV: the number of terms, then for each of them lease,
-- retention, unsettled retention, refuse (0, 1), max_attempts, alone; then for each key fingerprint, nonce, tenant,
-- trace and the number of its terms. A reply is the token alone where everything else is as the claim says, else
--   A token attempt first_seen birth trace [name value]...   acquired
--   R microseconds   running          F result attempt first_seen trace   finished
--   M fingerprint    mismatch         X reason attempt                    abandoned        E message   unreadable
local terms = {}
for i = 1, ARGV[1] do
  local at = 6 * i - 4
  local term = {
    lease_until = now + ARGV[at],
    retention = ARGV[at + 1],
    expires_at = now + ARGV[at + 2],
    refuse = ARGV[at + 3] == '1',
    max_attempts = tonumber(ARGV[at + 4]),
    alone = ARGV[at + 5],
  }
  term.counts = term.alone == '2' and '1' or '0'
  term.fresh = string.format(HEAD_FORMAT, IN_PROGRESS, now, term.lease_until, term.expires_at, now, term.retention,
    1, 0, term.counts, '0')
  terms[i] = term
end

local wrote = false

local function be_born(key, token, fingerprint, nonce, tenant, trace, term)
  local head = term.fresh
  if token ~= now then
    head = string.format(HEAD_FORMAT, IN_PROGRESS, token, term.lease_until, term.expires_at, now, term.retention,
      1, 0, term.counts, '0')
  end
  if tenant == '' and trace == '' then
    redis.call('HSET', key, 'head', head, 'fingerprint', fingerprint, 'nonce', nonce)
  else
    redis.call('HSET', key, 'head', head, 'fingerprint', fingerprint, 'nonce', nonce, 'tenant', tenant, 'trace', trace)
  end
  wrote = true
  if token == now then
    return now
  end
  return {'A', token, 1, now, nonce, trace}
end

local function acquired(key, token, attempt, first_seen, birth, trace, steps)
  local reply = {'A', token, attempt, first_seen, birth, trace}
  if steps == '1' then
    local fields = redis.call('HGETALL', key)
    for j = 1, #fields, 2 do
      if string.sub(fields[j], 1, 5) == 'step:' then
        reply[#reply + 1] = string.sub(fields[j], 6)
        reply[#reply + 1] = fields[j + 1]
      end
    end
  end
  return reply
end

local function decide(key, fingerprint, nonce, tenant, trace, term)
  local found = redis.pcall('HMGET', key, 'head', 'fingerprint', 'nonce', 'result', 'trace', 'birth')
  if found.err then
    return {'E', found.err}
  end
  if not found[1] then
    return be_born(key, now, fingerprint, nonce, tenant, trace, term)
  end
  local state, token, lease_until, expires_at, first_seen, _, attempt, deaths, counts, steps =
    string.match(found[1], HEAD)
  if not (state and found[2] and found[3]) then
    return {'E', 'not a record of this version'}
  end
  if state ~= IN_PROGRESS and now >= tonumber(expires_at) then
    redis.call('DEL', key)
    return be_born(key, math.max(token + 1, now), fingerprint, nonce, tenant, trace, term)
  end
  if found[2] ~= fingerprint then
    return {'M', found[2]}
  end
  attempt, deaths, first_seen = tonumber(attempt), tonumber(deaths), tonumber(first_seen)
  local birth = found[6] or found[3]
  local first_trace = found[5] or ''
  if state == COMPLETED or state == TOMBSTONE then
    return {'F', state == COMPLETED and found[4], attempt, first_seen, first_trace}
  end
  local new_counts = term.counts
  if state == IN_PROGRESS then
    if found[3] == nonce then
      return acquired(key, tonumber(token), attempt, first_seen, birth, first_trace, steps)
    end
    local left = lease_until - now
    if left > 0 then
      return {'R', left}
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
      new_counts = '1'
    end
  else
    redis.call('PERSIST', key)
  end
  token = math.max(token + 1, now)
  local head = string.format(HEAD_FORMAT, IN_PROGRESS, token, term.lease_until, term.expires_at, first_seen,
    term.retention, attempt, deaths, new_counts, steps)
  redis.call('HSET', key, 'head', head, 'nonce', nonce, 'birth', birth)
  wrote = true
  return acquired(key, token, attempt, first_seen, birth, first_trace, steps)
end

local replies = {}
local at = 6 * ARGV[1] + 2
for i, key in ipairs(KEYS) do
  replies[i] = decide(key, ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], terms[tonumber(ARGV[at + 4])])
  at = at + 5
end
if not wrote then
  local refused = refused_by_a_replica()
  if refused then
    return refused
  end
end
return replies
