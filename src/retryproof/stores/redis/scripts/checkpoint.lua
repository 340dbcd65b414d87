-- Keeps a batch of checkpoints, mirroring `checkpoint` in core/record.py. ARGV: for each key the fence and the
-- checkpoint as it stands in a record.
return fenced(read_head, function(key, record, state, item)
  if state ~= IN_PROGRESS then
    return false, false
  end
  call('APPEND', key, item)
  return true, true
end)
