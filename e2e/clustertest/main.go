package clustertest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Main runs a package's tests with a cluster, which it hands to use beforehand. A cluster that was up stays up, as does one with
// CLUSTER_KEEP set. For TestMain:
//
//	func TestMain(m *testing.M) { os.Exit(clustertest.Main(m, clustertest.Options{}, func(c *clustertest.Cluster) { shared = c })) }
func Main(m *testing.M, o Options, use func(*Cluster)) int {
	// The first time Kubernetes is built.
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	_, err := os.Stat(filepath.Join(o.runDir(), "options"))
	keep := err == nil || os.Getenv("CLUSTER_KEEP") != ""
	c, err := Up(ctx, o)
	code := 1
	if err == nil {
		use(c)
		code = m.Run()
	} else {
		fmt.Fprintln(os.Stderr, err)
	}
	if keep || c == nil {
		return code
	}
	if err := c.Down(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}
