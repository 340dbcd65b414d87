-- Renews a batch, mirroring `renew` in core/record.py. ARGV: for each key nonce, token, lease, alone (0, 1).
return fenced(function(key, at, state, token, rest)
  if state ~= IN_PROGRESS then
    return false, false
  end
  local lease_until, unchanged, counts, tail = match(rest, '^(%d+) (%d+ %d+ [01]) ([01])(.+)$')
  if ARGV[at + 1] == '0' then
    counts = '0'
  end
  call('HSET', key, 'head', format('%s %s %.0f %s %s%s', state, token, math.max(lease_until, now + ARGV[at]), unchanged,
    counts, tail))
  return true, true
end)
