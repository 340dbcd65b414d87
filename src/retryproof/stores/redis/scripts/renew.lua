-- Renews a batch, mirroring `renew` in core/record.py. ARGV: for each key the fence, lease d, alone (0, 1).
return fenced(read_head, function(key, record, state, item)
  if state ~= IN_PROGRESS then
    return false, false
  end
  local lease_until, counts = parse('<dB', record, 11)
  local lease, alone = parse('<dB', item)
  call('SETRANGE', key, '10', pack('<dB', math.max(lease_until, now + lease), math.min(counts, alone)))
  return true, true
end)
