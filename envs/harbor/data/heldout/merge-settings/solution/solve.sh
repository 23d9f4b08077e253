#!/bin/bash
set -euo pipefail
export LC_ALL=C
declare -A settings
for file in /app/settings.d/*.env; do
    while IFS= read -r line || [ -n "$line" ]; do
        case "$line" in '' | '#'*) continue ;; esac
        settings[${line%%=*}]=${line#*=}
    done < "$file"
done
for name in "${!settings[@]}"; do
    [ -z "${settings[$name]}" ] || echo "$name=${settings[$name]}"
done | sort > /app/settings.env
