// Package control is the language between the fabric of a cluster, the process that stands for the cloud around the nodes,
// and the tests that steer it: JSON over HTTP over a unix socket. The fabric outlives the tests, so every log is read from a
// place that the reader remembers.
package control
