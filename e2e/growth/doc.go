// Package growth measures what one daemon costs its node and the API server, and what that depends on: clusters of any size
// are made of objects in a real API server, the real daemon runs on a node of the lab, and everything it sends to and gets
// from the API server passes a relay that counts bytes.
//
// The tests are bars that do not depend on time. The benchmarks are the matrix: minutes, and gigabytes with the largest cluster.
//
//	go test ./growth                                        # the bars
//	go test ./growth -run '^$' -bench . -benchtime 1x       # the matrix, into ../out (make bench)
package growth
