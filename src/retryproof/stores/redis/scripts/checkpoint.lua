-- Keeps a batch of checkpoints, mirroring `checkpoint` in core/record.py. ARGV: for each key the fence and the
-- checkpoint as it stands in a record.
return fenced(read_head, 1, 2, function(key, record, state, at)
  if state ~= IN_PROGRESS then
    return false, false
  end
  call('APPEND', key, ARGV[at])
  return true, true
end)
