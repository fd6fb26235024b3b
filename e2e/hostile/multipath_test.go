package hostile

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// A connection of several paths (multipath TCP) is its first path's, and goes on over the others when that path's address is
// somebody else's: whoever keeps such a connection would be answered with the credentials of the address's next holder.
func TestHostileMultipath(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	s := newStage(t, lab.NodeOptions{IPv4Only: true})
	accomplice := s.pod(t, "accomplice", "")
	first, second := s.mallory.IPs[0], accomplice.IPs[0]
	gateway := s.mallory.IPs[0].As4()
	gateway[3] = 1
	in := func(p *lab.Pod, script string) {
		t.Helper()
		if out, err := p.Command(ctx, "sh", "-ec", script).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", script, err, out)
		}
	}
	// One pod with both addresses stands for two that have agreed on the keys of a connection, which cross the network in clear.
	in(accomplice, "ip link set eth0 down; ip link set eth0 netns "+s.mallory.Net.Name+" name eth1")
	in(s.mallory, fmt.Sprintf(`ip addr add %[1]s/32 dev eth1; ip link set eth1 up; ip route add %[2]s dev eth1 table 100
		ip route add default via %[2]s dev eth1 table 100; ip rule add from %[1]s lookup 100
		ip mptcp limits set subflow 2; ip mptcp endpoint add %[1]s dev eth1 subflow`, second, net.IP(gateway[:])))
	var c *net.TCPConn
	err := s.mallory.Net.Do(func() error {
		var d net.Dialer
		d.SetMultipathTCP(true)
		conn, err := d.DialContext(ctx, "tcp", endpoint)
		if err == nil {
			c = conn.(*net.TCPConn)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	request := "GET " + list + "/" + v1 + host + "\r\n"
	answers := func(wait time.Duration) string {
		_ = c.SetDeadline(time.Now().Add(wait))
		_, _ = io.WriteString(c, request)
		b := make([]byte, 8<<10)
		n, _ := c.Read(b)
		return string(b[:n])
	}
	if got := answers(10 * time.Second); !strings.HasSuffix(got, "mallory-role") {
		t.Fatalf("over its connection the pod is answered %q", got)
	}
	if several, err := c.MultipathTCP(); err != nil {
		t.Fatal(err)
	} else if several {
		t.Error("the daemon agreed to a connection of several paths")
	}

	// The first address goes to the next pod.
	if err := s.mallory.Delete(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.mallory.Unplug(); err != nil {
		t.Fatal(err)
	}
	arn, err := s.Role("heir-role")
	if err != nil {
		t.Fatal(err)
	}
	if err := shared.ServiceAccount(ctx, s.namespace, "heir", map[string]string{"eks.amazonaws.com/role-arn": arn}); err != nil {
		t.Fatal(err)
	}
	heir := labtest.Pod(t, s.Node, lab.PodSpec{Namespace: s.namespace, ServiceAccount: "heir", IP: first})
	s.roles[heir] = arn
	if err := s.own(ctx, heir); err != nil {
		t.Fatal(err)
	}
	if got := answers(3 * time.Second); got != "" {
		t.Errorf("the first holder of the address is answered %q", got)
	}
	s.untouched(t)
}
