package proxy

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
)

// panicking is a CallerFinder with a defect that one pod meets.
type panicking struct {
	CallerFinder
	ip  netip.Addr
	off *atomic.Bool
}

func (p panicking) Find(ip netip.Addr) (*Caller, error) {
	if ip == p.ip && !p.off.Load() {
		panic("a defect")
	}
	return p.CallerFinder.Find(ip)
}

// A handler that panics costs its own connection and nothing else: no share of the pod, no other pod's request, no flood of
// the log. Nothing in the daemon is known to panic; this is for what nobody knows.
func TestPanickingHandlerIsContained(t *testing.T) {
	var off atomic.Bool
	l := newLab(t, func(o *Options) {
		o.Callers = panicking{o.Callers, podIPs["special"], &off}
		o.MaxConnectionsPerIP = 50
	})
	l.warm(t, "role")
	for range 200 { // more than the connections that a pod may have
		c := dial(t, l.addr, podIPs["special"])
		fmt.Fprintf(c, "GET %s/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", roleList)
		if b, err := io.ReadAll(c); len(b) != 0 {
			t.Fatalf("a request whose handler panicked is answered %q, %v", b, err)
		}
		c.Close()
		if r := l.get(t, "role", roleList+"/"); r.StatusCode != 200 {
			t.Fatalf("another pod is answered %d", r.StatusCode)
		}
	}
	if n := strings.Count(l.logged.String(), "panic serving"); n == 0 || n > 50 {
		t.Errorf("%d lines of the log are about the panics", n)
	}
	off.Store(true)
	if r := l.get(t, "special", roleList+"/"); r.StatusCode != 200 {
		t.Errorf("once its handler panics no more the pod is answered %d", r.StatusCode)
	}
}
