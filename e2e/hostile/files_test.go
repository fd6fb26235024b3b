package hostile

import (
	"context"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// A node that lets the daemon open few files: one pod's connections take no more than its share of them, so another pod is accepted,
// and STS and the API server can be asked.
func TestHostileFewFiles(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	s := &stage{Node: labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true}), namespace: shared.Unique("shop"), roles: map[*lab.Pod]string{}}
	s.daemon = labtest.Launch(t, s.Node, lab.DaemonOptions{Flags: []string{"-issuer", "web-identity"}, Wrap: []string{"prlimit", "--nofile=64:64"}})
	if err := s.daemon.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	s.mallory, s.victim = s.pod(t, "mallory", ""), s.pod(t, "victim", "victim-role")
	if err := s.own(ctx, s.victim); err != nil {
		t.Fatal(err)
	}
	var connections sync.WaitGroup
	stop := make(chan struct{})
	stopped := func() bool {
		select {
		case <-stop:
			return true
		default:
			return false
		}
	}
	for range 100 {
		connections.Go(func() {
			for !stopped() {
				dial, cancel := context.WithTimeout(ctx, impatient)
				c, err := s.mallory.Dial(dial, "tcp", endpoint)
				cancel()
				if err != nil {
					continue
				}
				_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
				_, _ = io.Copy(io.Discard, c)
				c.Close()
			}
		})
	}
	defer connections.Wait()
	defer close(stop)
	metrics := func() map[string]float64 {
		m, err := s.daemon.Metrics(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	eventually(t, func() error { // until all of the share is taken
		const refused = `imdsgate_denied_requests_total{reason="connections"}`
		if n := metrics()[refused]; n < 100 {
			return fmt.Errorf("%v connections were refused", n)
		}
		return nil
	})
	for range 20 {
		s.victim.HTTP().CloseIdleConnections()
		if err := s.ownNow(ctx, s.victim); err != nil {
			t.Fatal(err)
		}
	}
	fresh := s.pod(t, "fresh", "fresh-role") // whose credentials are still to be issued
	if err := s.own(ctx, fresh); err != nil {
		t.Error(err)
	}
	s.untouched(t)
}
