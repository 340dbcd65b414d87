-- Completes or releases a batch, mirroring `settle` in core/record.py. ARGV: for each key nonce, token, the state to
-- settle in (2 released, 3 completed, 4 tombstone) and the result, empty but for state 3.
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
  if steps == '1' and new_state == RELEASED then
    -- Part of the effect is there: as in progress, only a reaper ends it.
    call('HSET', key, 'head', format('%s %s %.0f %s %s 1%s', RELEASED, token, now, expires_at, retention, tail))
    return true, true
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
