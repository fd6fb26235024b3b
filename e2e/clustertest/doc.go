// Package clustertest fits a real cluster (e2e/cluster) to tests: it brings the cluster up, or joins the one that is up, and
// speaks to its API server, its nodes, AWS and the real metadata endpoint. There is one cluster on a machine; tests of several
// packages share it one package after the other (go test -p 1), each with namespaces of its own.
package clustertest
