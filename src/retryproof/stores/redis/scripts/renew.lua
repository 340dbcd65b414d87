-- Renews a batch, mirroring `renew` in core/record.py. ARGV: for each key nonce, token, lease, alone (0, 1).
return fenced(4, function(key, at, state, token, lease_until, expires_at, first_seen, retention, attempt, deaths,
    counts, steps)
  if state ~= IN_PROGRESS then
    return false, false
  end
  if ARGV[at + 1] == '0' then
    counts = '0'
  end
  redis.call('HSET', key, 'head', string.format(HEAD_FORMAT, state, token, math.max(lease_until, now + ARGV[at]),
    expires_at, first_seen, retention, attempt, deaths, counts, steps))
  return true, true
end)
