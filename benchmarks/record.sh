#!/bin/sh
# Runs a command and keeps what it prints, for RESULTS.md: benchmarks/record.sh guard python benchmarks/guard.py
name=$1
shift
folder=$(dirname "$0")/results
{ echo "\$ $*" && "$@"; } > "$folder/$name.tmp" && mv "$folder/$name.tmp" "$folder/$name.txt" && cat "$folder/$name.txt"
