package clients

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var endpoints = []netip.Addr{netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("fd00:ec2::254")}

// exchange is one metadata request as the pod's network saw it.
type exchange struct {
	method, target string
	status         string // of the answer; empty while there is none
	after          time.Duration
	sent           time.Time
	port           uint16
}

func (e exchange) String() string {
	return fmt.Sprintf("%s %s %s %v", e.method, e.target, e.status, e.after.Round(time.Millisecond))
}

// list says whether the request is for the role list.
func (e exchange) list() bool {
	return strings.TrimSuffix(e.target, "/") == "/latest/meta-data/iam/security-credentials"
}

// document says whether the request is for a credential document.
func (e exchange) document() bool {
	return strings.HasPrefix(e.target, "/latest/meta-data/iam/security-credentials/") && !e.list()
}

// wire watches the metadata requests of one network namespace from its own side, so what is counted
// is what the client really sent and got, whoever answers.
type wire struct {
	sock *os.File
	done chan struct{}

	mu        sync.Mutex
	exchanges []exchange
	watches   []watch
}

type watch struct {
	match func(exchange) bool
	seen  chan struct{}
}

// tap starts watching. It must be called inside the namespace.
func tap() (*wire, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	w := &wire{sock: os.NewFile(uintptr(fd), "wire"), done: make(chan struct{})}
	raw, err := w.sock.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	go w.read(raw)
	return w, nil
}

// when returns a channel that is closed at the next request that matches.
func (w *wire) when(match func(exchange) bool) <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	seen := make(chan struct{})
	w.watches = append(w.watches, watch{match, seen})
	return seen
}

// stop ends the watch and returns every request there was, what still waits in the socket included.
func (w *wire) stop() []exchange {
	_ = w.sock.SetReadDeadline(time.Unix(1, 0))
	<-w.done
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.exchanges
}

func (w *wire) read(raw syscall.RawConn) {
	defer close(w.done)
	defer w.sock.Close()
	buf := make([]byte, 64<<10)
	drain := func(fd uintptr) bool {
		for {
			n, from, err := unix.Recvfrom(int(fd), buf, 0)
			if err != nil {
				return !errors.Is(err, unix.EAGAIN)
			}
			// On lo every packet passes twice: requests count on their way out, answers on their way in.
			if ll, ok := from.(*unix.SockaddrLinklayer); ok {
				w.packet(buf[:n], ll.Pkttype == unix.PACKET_OUTGOING)
			}
		}
	}
	_ = raw.Read(drain) // until the deadline that stop sets
	_ = raw.Control(func(fd uintptr) { drain(fd) })
}

func (w *wire) packet(b []byte, outgoing bool) {
	var src, dst netip.Addr
	switch {
	case len(b) >= 20 && b[0]>>4 == 4 && b[9] == unix.IPPROTO_TCP:
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		b = b[min(len(b), int(b[0]&15)*4):min(len(b), int(binary.BigEndian.Uint16(b[2:])))]
	case len(b) >= 40 && b[0]>>4 == 6 && b[6] == unix.IPPROTO_TCP:
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		b = b[40:]
	default:
		return
	}
	if len(b) < 20 {
		return
	}
	sport, dport := binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	payload := b[min(len(b), int(b[12]>>4)*4):]
	head, _, _ := bytes.Cut(payload, []byte("\r\n"))
	words := strings.Fields(string(head))
	if len(words) < 2 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case outgoing && dport == 80 && isEndpoint(dst) && len(words) == 3 && strings.HasPrefix(words[2], "HTTP/"):
		e := exchange{method: words[0], target: words[1], sent: time.Now(), port: sport}
		w.exchanges = append(w.exchanges, e)
		left := w.watches[:0]
		for _, x := range w.watches {
			if x.match(e) {
				close(x.seen)
			} else {
				left = append(left, x)
			}
		}
		w.watches = left
	case !outgoing && sport == 80 && isEndpoint(src) && strings.HasPrefix(words[0], "HTTP/"):
		for i := range w.exchanges {
			if e := &w.exchanges[i]; e.port == dport && e.status == "" {
				e.status, e.after = words[1], time.Since(e.sent)
				break
			}
		}
	}
}

func isEndpoint(a netip.Addr) bool { return a == endpoints[0] || a == endpoints[1] }

func htons(v uint16) uint16 { return v<<8 | v>>8 }
