package hostile

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/e2e/lab"
)

// wire sends whole packets from inside a pod: the pod's own routing decides where, its own netfilter is passed by.
type wire struct{ v4, v6 int }

func newWire(t testing.TB, p *lab.Pod) wire {
	t.Helper()
	var w wire
	err := p.Net.Do(func() (err error) {
		if w.v4, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			return err
		}
		w.v6, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	if err != nil {
		t.Fatalf("open raw sockets: %v", err)
	}
	t.Cleanup(func() {
		_ = unix.Close(w.v4)
		_ = unix.Close(w.v6)
	})
	return w
}

// send sends a packet, unless the pod's own kernel does not want it.
func (w wire) send(packet []byte) error {
	return whileFull(func() error {
		if packet[0]>>4 == 4 {
			return unix.Sendto(w.v4, packet, 0, &unix.SockaddrInet4{Addr: [4]byte(packet[16:20])})
		}
		return unix.Sendto(w.v6, packet, 0, &unix.SockaddrInet6{Addr: [16]byte(packet[24:40])})
	})
}
