-- Completes or releases a batch, mirroring `settle` in core/record.py. ARGV: for each key nonce, token, the state to
-- settle in (2 released, 3 completed, 4 tombstone) and the result, empty but for state 3.
local function forget_steps(key)
  for _, name in ipairs(redis.call('HKEYS', key)) do
    if string.sub(name, 1, 5) == 'step:' then
      redis.call('HDEL', key, name)
    end
  end
end

return fenced(4, function(key, at, state, token, _, _, first_seen, retention, attempt, deaths, counts, steps)
  local new_state = ARGV[at]
  if state ~= IN_PROGRESS then
    return (state == RELEASED) == (new_state == RELEASED), false
  end
  if steps == '1' and new_state ~= RELEASED then
    forget_steps(key)
    steps = '0'
  end
  local expires_at = now + retention
  local head = string.format(HEAD_FORMAT, new_state, token, now, expires_at, first_seen, retention, attempt, deaths,
    counts, steps)
  if new_state == COMPLETED then
    redis.call('HSET', key, 'head', head, 'result', ARGV[at + 1])
  else
    redis.call('HSET', key, 'head', head)
  end
  expire(key, expires_at)
  return true, true
end)
