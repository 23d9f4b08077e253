#!/bin/bash
# Files that the agent has not seen; the reward is 1 if every sum is right.
mkdir -p /logs/verifier
folder=$(mktemp -d)
printf 'id;customer;amount\n1;Ada;120\n2;Grace;80\n\n3;Barbara;-15\n4;Edsger;007\n' > "$folder/shipped.csv"
printf 'id;customer;amount\n' > "$folder/empty.csv"
printf 'id;customer;amount\n1;A;5\n2;B;6' > "$folder/no newline.csv"
printf 'id;customer;amount\n1;A, B and C;10\n2;*;-30\n\n\n3;D;08\n' > "$folder/odd names.csv"
passed=0
check() {
    found=$(timeout 10 bash /app/total.sh "$folder/$1" 2>&1)
    if [ "$found" = "$2" ]; then passed=$((passed + 1)); else echo "$1: expected $2, found $found"; fi
}
check shipped.csv 192
check empty.csv 0
check 'no newline.csv' 11
check 'odd names.csv' -12
reward=0
[ "$passed" -eq 4 ] && reward=1
echo "$reward" > /logs/verifier/reward.txt
