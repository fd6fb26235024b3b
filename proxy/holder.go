package proxy

import (
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel sends an answer again and again until it is acknowledged, and by address: a pod that ended without a word leaves it to the
// next holder of its IP. So a connection belongs to the pod that was identified on it, and is reset with all that was not acknowledged
// when the IP is another's; and what its peer does not acknowledge does not live longer than unacknowledged.

// unacknowledged is what an answer may be at most. Kernels acknowledge, not programs: a pod that is stopped or busy does too, until the
// kernel holds tens of kilobytes that it does not read; tcp(7) counts what then cannot be sent as well.
const unacknowledged = 2 * time.Second

// Moved takes note that ip, whose holder Find named until now, is the pod's with the given UID, or nobody's when that is empty. Find
// must say so already. It never blocks for long and is safe for concurrent use.
func (s *Server) Moved(ip netip.Addr, uid string) {
	for _, c := range s.conns.moved(ip, uid) {
		reset(c.Conn)
	}
}

// moved returns the connections of ip on which another pod was identified. They are no longer counted.
func (s *shares) moved(ip netip.Addr, uid string) (others []*conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.sources[ip]
	if src == nil {
		return nil
	}
	src.moves.Add(1)
	for c := range src.conns {
		if of := c.of.Load(); of != nil && of.Pod.UID != uid {
			others = append(others, c)
		}
	}
	for _, c := range others {
		s.remove(c)
	}
	return others
}

// moves is how often the IP of the connection has changed hands while it was open.
func (c *conn) moves() int64 {
	if c == nil || c.source == nil {
		return 0
	}
	return c.source.moves.Load()
}

// belongs notes whose the connection is. It says no when the IP has changed hands after it had done so moves times: then moved may have
// missed this one, and who it is must be asked again.
func (c *conn) belongs(to *Caller, moves int64) bool {
	if c == nil || c.source == nil {
		return true
	}
	if c.of.Load() != to {
		c.of.Store(to)
	}
	return c.moves() == moves
}

// linger closes the connection when its peer has acknowledged everything, or has had its time for it. Once it is closed, what is left
// is the kernel's alone, and moved does not reach it.
func (c *conn) linger() {
	const often = 10 * time.Millisecond
	for end := time.Now().Add(unacknowledged); !acknowledged(c.Conn) && time.Now().Before(end); {
		time.Sleep(often)
	}
	_ = c.end()
}

// acknowledged says whether the peer has acknowledged all that was written. It does not tell of what is no TCP connection, or none
// any more.
func acknowledged(c net.Conn) bool {
	n := 0
	_ = control(c, func(fd int) error { // fails when it is closed
		var err error
		n, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
		return err
	})
	return n == 0
}

func control(of any, f func(fd int) error) error {
	sc, ok := of.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = f(int(fd)) }); err != nil {
		return err
	}
	return failed
}

// reset ends a connection at once, with all that its peer has not acknowledged.
func reset(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}
