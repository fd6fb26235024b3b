package hostile

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// A pod ends with an answer on its way, which it does not acknowledge any more, and its address is another pod's at once. That one
// listens to everything on its link (NET_RAW): the kernel would send the answer, with the credentials, again and again.
func TestHostileUnacknowledged(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	for name, head := range map[string]string{"kept alive": "", "closed": "Connection: close\r\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, lab.NodeOptions{IPv4Only: true})
			c := mustDial(t, s.victim, endpoint)
			if out, err := s.victim.Command(ctx, "iptables", "-A", "INPUT", "-j", "DROP").CombinedOutput(); err != nil {
				t.Fatalf("%v %s", err, out)
			}
			_, _ = io.WriteString(c, "GET "+list+"/victim-role"+v1+host+head+"\r\n")
			unacknowledged := "ss -Htn src " + at(s.IP, 8254) + " and dst " + s.victim.IPs[0].String()
			eventually(t, func() error {
				for _, line := range strings.Split(s.on(t, unacknowledged), "\n") {
					if f := strings.Fields(line); len(f) > 2 && f[2] != "0" {
						return nil
					}
				}
				return fmt.Errorf("no answer is on its way")
			})
			if err := s.victim.Unplug(); err != nil {
				t.Fatal(err)
			}
			if err := s.victim.Delete(ctx); err != nil {
				t.Fatal(err)
			}
			heir := labtest.Pod(t, s.Node, lab.PodSpec{Namespace: s.namespace, ServiceAccount: "none", IP: s.victim.IPs[0]})
			seen, err := overhear(heir, 8*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if keys := accessKeys.FindAllString(seen, -1); len(keys) > 0 {
				t.Errorf("the next holder of %s was sent %q of the one before", heir.IPs[0], keys)
			}
			s.untouched(t)
		})
	}
}

// overhear is all that comes to a pod's link.
func overhear(p *lab.Pod, patience time.Duration) (string, error) {
	var seen strings.Builder
	err := p.Net.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(bigEndian(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		step := unix.Timeval{Usec: 100_000}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &step); err != nil {
			return err
		}
		b := make([]byte, 64<<10)
		for end := time.Now().Add(patience); time.Now().Before(end); {
			n, _, err := unix.Recvfrom(fd, b, 0)
			if err == nil {
				seen.Write(b[:n])
			}
		}
		return nil
	})
	return seen.String(), err
}
