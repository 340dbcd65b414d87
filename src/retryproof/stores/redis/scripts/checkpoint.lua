-- Keeps a batch of checkpoints, mirroring `checkpoint` in core/record.py. ARGV: for each key nonce, token, name, value.
return fenced(4, function(key, at, state, token, lease_until, expires_at, first_seen, retention, attempt, deaths,
    counts)
  if state ~= IN_PROGRESS then
    return false, false
  end
  local head = string.format(HEAD_FORMAT, state, token, lease_until, expires_at, first_seen, retention, attempt,
    deaths, counts, '1')
  redis.call('HSET', key, 'head', head, 'step:' .. ARGV[at], ARGV[at + 1])
  return true, true
end)
