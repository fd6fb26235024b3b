// Package faults breaks one thing at a time on a real cluster, under a steady load of full SDK sequences from pods of both nodes,
// and records what they saw: the table in docs/faults.md. Nothing of it is left to chance: every answer of every pod is judged
// while a fault lasts, and the real metadata endpoint and AWS are asked who reached them.
//
// `make test` runs what takes seconds; with FAULTS=long (`make test-faults`) the same tests take their time, and those join that
// cannot be quick. A run ends with the names of the faults that it left out.
package faults
