package hostile

import (
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// A machine on the node's own link sends what is for the endpoint through the node. It is redirected like a pod, and nobody: there is
// no pod at its address; with a pod's address it gets no connection, because the answers go to the pod.
func TestHostileOtherNode(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	s := newStage(t, lab.NodeOptions{})
	other := labtest.Node(t, shared, lab.NodeOptions{})
	stranger := labtest.Pod(t, other, lab.PodSpec{HostNetwork: true})
	if _, err := other.Run(ctx, "ip", "route", "replace", "169.254.169.254", "via", s.IP.String()); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(ctx, stranger, http.MethodPut, "/latest/api/token", http.Header{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": {"60"}}); err != nil {
		t.Fatalf("the way through the node leads nowhere: %v", err)
	}
	for _, path := range []string{list + "/", list + "/victim-role", "/latest/meta-data/iam/info", "/latest/meta-data/placement/region"} {
		if answer, err := ask(ctx, stranger, http.MethodGet, path, nil); err == nil {
			t.Errorf("another node is answered %q to %s", answer, path)
		}
	}
	from := func(ip netip.Addr, wait time.Duration) error {
		return other.Net.Do(func() error {
			d := net.Dialer{Timeout: wait, LocalAddr: &net.TCPAddr{IP: ip.AsSlice()}}
			c, err := d.DialContext(ctx, "tcp", endpoint)
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	if err := from(other.IP, 10*time.Second); err != nil {
		t.Error(err)
	}
	for _, p := range []*lab.Pod{s.victim, s.none} {
		if _, err := other.Run(ctx, "ip", "addr", "add", p.IPs[0].String()+"/32", "dev", "lo"); err != nil {
			t.Fatal(err)
		}
		if err := from(p.IPs[0], impatient); err == nil {
			t.Errorf("with the address of pod %s another node can connect", p.Name)
		}
	}
	for _, p := range []*lab.Pod{s.mallory, s.victim} {
		if err := s.own(ctx, p); err != nil {
			t.Error(err)
		}
	}
	s.untouched(t)
}
