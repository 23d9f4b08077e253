#!/bin/bash
# The reward is 1 for the right file; `lines` says how much of it is right.
mkdir -p /logs/verifier
expected=('GREETING=hello world' 'HOST=localhost' 'LEVEL=warning' 'PORT=9090' 'TOKEN=abc=def==' 'host=lower case')
right=0
for line in "${expected[@]}"; do
    grep -qxF -- "$line" /app/settings.env 2> /dev/null && right=$((right + 1))
done
reward=0
[ "$(cat /app/settings.env 2> /dev/null)" = "$(printf '%s\n' "${expected[@]}")" ] && reward=1
printf '{"reward": %d, "lines": %d.%02d}\n' "$reward" $((right / 6)) $((right * 100 / 6 % 100)) > /logs/verifier/reward.json
