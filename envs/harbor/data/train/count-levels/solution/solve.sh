#!/bin/bash
set -euo pipefail
for level in ERROR WARNING INFO; do
    number=$(find /app/logs -name '*.log' -exec cat {} + |
        grep -cE "^[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} $level ")
    echo "$level $number"
done > /app/report.txt
