package hostile

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// Whoever is on a link has as many link-local addresses of IPv6 as it likes, and answers come to all of them, also on a link of the
// pod's own. They have one share of the connections together.
func TestHostileLinkLocal(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	s := newStage(t, lab.NodeOptions{})
	const many, share = 600, 256
	var add bytes.Buffer
	for i := range many {
		fmt.Fprintf(&add, "addr add fe80::%x/64 dev eth0 nodad\n", 0x1000+i)
	}
	cmd := s.mallory.Command(ctx, "ip", "-6", "-batch", "-")
	cmd.Stdin = &add
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	answered := 0
	err := s.mallory.Net.Do(func() error {
		for i := range many {
			d := net.Dialer{Timeout: impatient, LocalAddr: &net.TCPAddr{IP: net.ParseIP(fmt.Sprintf("fe80::%x", 0x1000+i)), Zone: "eth0"}}
			c, err := d.DialContext(ctx, "tcp6", endpoint6)
			if err != nil {
				continue
			}
			t.Cleanup(func() { _ = c.Close() })
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			_, _ = io.WriteString(c, "GET /"+v1+host+"\r\n")
			if _, err := c.Read(make([]byte, 1<<10)); err == nil {
				answered++
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if answered == 0 || answered > share { // none: what follows would prove nothing
		t.Errorf("%d of %d connections of one pod are answered", answered, many)
	}
	for range 3 {
		if err := s.own(ctx, s.victim); err != nil {
			t.Error(err)
		}
		mustDial(t, s.victim, endpoint6)
	}
	s.untouched(t)
}
