#!/bin/bash
# Prints the sum of the third column.
total=0
while read line; do
    amount=$(echo $line | cut -d, -f3)
    total=$((total + amount))
done < $1
echo "$total"
