-- Completes or releases a batch, mirroring `settle` in core/record.py. ARGV: for each key nonce, token, the state to
-- settle in (2 released, 3 completed, 4 tombstone) and the result of state 3; for state 2 "1" where an operator settles.
local function forget_steps(key)
  for _, name in ipairs(call('HKEYS', key)) do
    if sub(name, 1, 5) == 'step:' then
      call('HDEL', key, name)
    end
  end
end

-- Retentions are often equal in a batch: what follows from one is written once.
local ends = {}
local function ending(retention)
  local known = ends[retention]
  if not known then
    local expires_at = now + retention
    known = {
      times = format(' %.0f %.0f %s ', now, expires_at, retention),
      milliseconds = format('%.0f', math.ceil(expires_at / 1000)),
    }
    ends[retention] = known
  end
  return known
end

return fenced(function(key, at, state, token, rest)
  local new_state = ARGV[at]
  if state ~= IN_PROGRESS then
    return (state == RELEASED) == (new_state == RELEASED), false
  end
  local expires_at, retention, steps, tail = match(rest, '^%d+ (%d+) (%d+) ([01])(.+)$')
  if new_state == RELEASED then
    local counts, first_seen, attempt = match(tail, '^ ([01]) (%d+) (%d+)')
    if ARGV[at + 1] == '1' then
      attempt, tail = '1', format(' %s %s 1 0', counts, first_seen)
    end
    if unsettled(RELEASED, steps, attempt) then
      -- All or part of the effect may be there: as in progress, only a reaper ends it.
      call('HSET', key, 'head', format('%s %s %.0f %s %s %s%s', RELEASED, token, now, expires_at, retention, steps, tail))
      return true, true
    end
  end
  if steps == '1' then
    forget_steps(key)
    steps = '0'
  end
  local close = ending(retention)
  local head = new_state .. ' ' .. token .. close.times .. steps .. tail
  if new_state == COMPLETED then
    call('HSET', key, 'head', head, 'result', ARGV[at + 1])
  else
    call('HSET', key, 'head', head)
  end
  call('PEXPIREAT', key, close.milliseconds)
  return true, true
end)
