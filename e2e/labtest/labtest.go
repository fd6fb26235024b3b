// Package labtest fits the lab to tests: what goes wrong is the test's failure, and what was made goes with the test.
package labtest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
)

// Main runs a package's tests with one lab, which it hands to use beforehand. For TestMain:
//
//	func TestMain(m *testing.M) { os.Exit(labtest.Main(m, func(l *lab.Lab) { shared = l })) }
func Main(m *testing.M, use func(*lab.Lab)) int {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	l, err := lab.Start(ctx, lab.Options{Race: os.Getenv("LAB_RACE") != "", Daemon: os.Getenv("LAB_DAEMON")})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	use(l)
	// Tests of a lab wait more than they compute: more of them at a time than there are processors.
	flag.Parse()
	if v := flag.Lookup("test.parallel"); v.Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		if err := v.Value.Set("6"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	code := m.Run()
	if err := l.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "remove the lab:", err)
		return 1
	}
	return code
}

// Context ends with the test, or after a time in which nothing in the lab can still be all right.
func Context(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// Eventually repeats check, for a minute, until it has nothing to say: for what only an answer to a question tells.
func Eventually(t testing.TB, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-time.After(25 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal(err)
		}
	}
}

// Node adds a node for the test.
func Node(t testing.TB, l *lab.Lab, o lab.NodeOptions) *lab.Node {
	t.Helper()
	n, err := l.AddNode(Context(t), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("remove %s: %v", n.Name, err)
		}
	})
	return n
}

// Pod adds a pod to the node.
func Pod(t testing.TB, n *lab.Node, s lab.PodSpec) *lab.Pod {
	t.Helper()
	p, err := n.AddPod(Context(t), s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Daemon starts a daemon and waits until it is ready. Its log is the test's when the test fails.
func Daemon(t testing.TB, n *lab.Node, flags ...string) *lab.Daemon {
	t.Helper()
	d := Launch(t, n, lab.DaemonOptions{Flags: flags})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := d.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return d
}

// Launch starts a daemon without waiting for it.
func Launch(t testing.TB, n *lab.Node, o lab.DaemonOptions) *lab.Daemon {
	t.Helper()
	d, err := n.LaunchDaemon(Context(t), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.Kill()
		for _, bad := range []string{"panic:", "DATA RACE", "fatal error:"} {
			if strings.Contains(d.Log().String(), bad) {
				t.Errorf("the daemon wrote %q", bad)
			}
		}
		if t.Failed() {
			t.Logf("the daemon with %v wrote:\n%s", o.Flags, d.Log().Tail(60))
		}
	})
	return d
}

// Untouched fails the test unless the node's real metadata endpoint is as it should be.
func Untouched(t testing.TB, n *lab.Node, e imds.Expected) {
	t.Helper()
	if err := n.Untouched(Context(t), e); err != nil {
		t.Error(err)
	}
}
