-- Renews a batch, mirroring `renew` in core/record.py. ARGV: for each key the fence, lease, alone (0, 1).
return fenced(read_head, 1, 3, function(key, record, state, at)
  if state ~= IN_PROGRESS then
    return false, false
  end
  local lease_until, counts = parse('<dB', record, 11)
  if ARGV[at + 1] == '0' then
    counts = 0
  end
  call('SETRANGE', key, '10', pack('<dB', math.max(lease_until, now + ARGV[at]), counts))
  return true, true
end)
