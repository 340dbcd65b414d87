-- Claims a batch, mirroring `decide` in core/record.py. ARGV: the number of terms, then for each of them lease,
-- retention, unsettled retention, refuse (0, 1), max_attempts, alone; then for each key fingerprint, nonce, tenant,
-- trace and the number of its terms. A reply is the token alone where everything else is as the claim says, else
--   A token attempt first_seen birth trace [name value]...   acquired
--   R microseconds   running          F result attempt first_seen trace   finished
--   M fingerprint    mismatch         X reason attempt                    abandoned        E   unreadable
local SETTLED = '^([34]) %d+ %d+ (%d+) %d+ [01] [01] (%d+) (%d+) %d+$'
local UNREADABLE = {'E'}

local function fresh_head(token, term)
  return format(HEAD_FORMAT, IN_PROGRESS, token, term.lease_until, term.expires_at, term.retention, '0', term.counts,
    now, 1, 0)
end

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
  term.fresh = fresh_head(now, term)
  terms[tostring(i)] = term
end

local wrote = false

local function be_born(key, token, fingerprint, nonce, tenant, trace, term)
  local head = token == now and term.fresh or fresh_head(token, term)
  if tenant == '' and trace == '' then
    call('HSET', key, 'head', head, 'fingerprint', fingerprint, 'nonce', nonce)
  else
    call('HSET', key, 'head', head, 'fingerprint', fingerprint, 'nonce', nonce, 'tenant', tenant, 'trace', trace)
  end
  wrote = true
  return token == now and now or {'A', token, 1, now, nonce, trace}
end

local function acquired(key, token, attempt, first_seen, birth, trace, steps)
  local reply = {'A', token, attempt, first_seen, birth, trace}
  if steps == '1' then
    local fields = call('HGETALL', key)
    for j = 1, #fields, 2 do
      if sub(fields[j], 1, 5) == 'step:' then
        reply[#reply + 1] = sub(fields[j], 6)
        reply[#reply + 1] = fields[j + 1]
      end
    end
  end
  return reply
end

-- A record that is there and is not completed within its retention.
local function reclaim(key, found, fingerprint, nonce, tenant, trace, term)
  local state, token, lease_until, expires_at, _, steps, counts, first_seen, attempt, deaths = match(found[1], HEAD)
  if not (state and found[2] and found[3]) then
    return UNREADABLE
  end
  if state ~= IN_PROGRESS and not unsettled(state, steps, attempt) and now >= tonumber(expires_at) then
    call('DEL', key)
    return be_born(key, math.max(token + 1, now), fingerprint, nonce, tenant, trace, term)
  end
  if found[2] ~= fingerprint then
    return {'M', found[2]}
  end
  attempt, deaths, first_seen = tonumber(attempt), tonumber(deaths), tonumber(first_seen)
  local birth, first_trace = found[6] or found[3], found[5] or ''
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
  elseif found[3] == nonce then
    return {'R', 0}
  elseif attempt > 1 and term.refuse then
    return {'X', 'refused', attempt}
  else
    call('PERSIST', key)
  end
  token = math.max(token + 1, now)
  local head = format(HEAD_FORMAT, IN_PROGRESS, token, term.lease_until, term.expires_at, term.retention, steps,
    new_counts, first_seen, attempt, deaths)
  call('HSET', key, 'head', head, 'nonce', nonce, 'birth', birth)
  wrote = true
  return acquired(key, token, attempt, first_seen, birth, first_trace, steps)
end

local function decide(key, fingerprint, nonce, tenant, trace, term)
  local found = pcall('HMGET', key, 'head', 'fingerprint', 'nonce', 'result', 'trace', 'birth')
  if found.err then
    return UNREADABLE
  end
  if not found[1] then
    return be_born(key, now, fingerprint, nonce, tenant, trace, term)
  end
  local state, expires_at, first_seen, attempt = match(found[1], SETTLED)
  if state and found[2] == fingerprint and now < tonumber(expires_at) then
    return {'F', state == COMPLETED and found[4], tonumber(attempt), tonumber(first_seen), found[5]}
  end
  return reclaim(key, found, fingerprint, nonce, tenant, trace, term)
end

local replies = {}
local at = 6 * ARGV[1] + 2
for i, key in ipairs(KEYS) do
  replies[i] = decide(key, ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], terms[ARGV[at + 4]])
  at = at + 5
end
return not wrote and refused_by_a_replica() or replies
