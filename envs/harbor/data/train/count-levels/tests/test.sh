#!/bin/bash
# Compares the report with the right one.
expected='ERROR 2
WARNING 4
INFO 6'
mkdir -p /logs/verifier
if [ -f /app/report.txt ] && [ "$(cat /app/report.txt)" = "$expected" ]; then
    echo 1 > /logs/verifier/reward.txt
else
    echo "expected:"; echo "$expected"; echo "found:"; cat /app/report.txt
    echo 0 > /logs/verifier/reward.txt
fi
