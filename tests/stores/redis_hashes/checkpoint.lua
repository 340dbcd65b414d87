-- Keeps a batch of checkpoints, mirroring `checkpoint` in core/record.py. ARGV: for each key nonce, token, name, value.
return fenced(function(key, at, state, token, rest)
  if state ~= IN_PROGRESS then
    return false, false
  end
  local unchanged, tail = match(rest, '^(%d+ %d+ %d+) [01](.+)$')
  call('HSET', key, 'head', state .. ' ' .. token .. ' ' .. unchanged .. ' 1' .. tail, 'step:' .. ARGV[at], ARGV[at + 1])
  return true, true
end)
