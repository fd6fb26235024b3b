package hostile

import (
	"context"
	"net"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// Thousands of requests that somebody has used against a metadata endpoint, a proxy or a filter, from a pod with a role and,
// over IPv6, from one without: no answer holds credentials but the pod's own, nothing that nobody may have is a 200, nothing is a
// redirect, every connection ends, and at the real endpoint is no request that the table did not build. (S6, S7, S8, S11;
// CVE-2022-23551 is among the paths)
func TestHostileRequests(t *testing.T) {
	s := newStage(t, lab.NodeOptions{})
	requests := Requests(Names{
		Own: "mallory-role", OwnPath: "team/mallory-role", Other: "victim-role", Node: lab.NodeRole,
		OtherIP: s.victim.IPs[0].String(), NodeIP: s.IP.String(),
	})
	t.Logf("%d requests", len(requests))
	if len(requests) < 3000 {
		t.Errorf("the corpus has %d requests", len(requests))
	}
	for name, p := range map[string]*lab.Pod{"with a role": s.mallory, "without": s.none} {
		to := endpoint
		if p == s.none {
			to = endpoint6
		}
		o := Try(t.Context(), func(ctx context.Context) (net.Conn, error) { return p.Dial(ctx, "tcp", to) }, requests, lab.NodeRole)
		t.Logf("a pod %s is answered %v", name, o.Statuses)
		if err := o.Check(); err != nil {
			t.Errorf("a pod %s: %v", name, err)
		}
		for key, request := range o.Keys {
			if err := s.stolen(p, key); err != nil {
				t.Errorf("a pod %s, by %s: %v", name, request, err)
			}
		}
		if p == s.none && len(o.Keys) > 0 {
			t.Errorf("credentials for a pod without a role: %v", o.Keys)
		}
	}
	for _, p := range []*lab.Pod{s.mallory, s.victim} {
		if err := s.own(labtest.Context(t), p); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	}
	s.untouched(t)
}
