#!/bin/bash
set -euo pipefail
cat > /app/total.sh <<'SCRIPT'
#!/bin/bash
# Prints the sum of the third column.
total=0
while IFS=';' read -r _ _ amount || [ -n "$amount" ]; do
    [ -n "$amount" ] || continue
    sign=${amount%%[0-9]*}
    total=$((total + ${sign}10#${amount#"$sign"}))
done < <(tail -n +2 "$1")
echo "$total"
SCRIPT
