package proxy

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/cache"
)

type noCredentials struct{}

func (noCredentials) Peek(*cache.Key, *cache.Ref, time.Time) *cache.Credentials { return nil }
func (noCredentials) Get(context.Context, cache.Key) (*cache.Credentials, error) {
	return nil, cache.ErrUnavailable
}

func TestPeer(t *testing.T) {
	for remote, want := range map[string]string{
		"10.1.2.3:80": "10.1.2.3", "[::ffff:10.1.2.3]:80": "10.1.2.3", "[fd00::1]:80": "fd00::1", "[fe80::1%veth1]:80": "fe80::%veth1",
		"[febf::2%veth1]:80": "fe80::%veth1", "169.254.172.2:80": "169.254.172.2", "nonsense": "invalid IP", "": "invalid IP",
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = remote
		r.Header.Set("X-Forwarded-For", "10.9.9.9")
		if got, _ := peer(r); got.String() != want {
			t.Errorf("%q: %s", remote, got)
		}
	}
	for _, addr := range []net.Addr{
		&net.TCPAddr{IP: net.ParseIP("10.1.2.3"), Port: 1}, net.TCPAddrFromAddrPort(netip.MustParseAddrPort("[::ffff:10.1.2.3]:1")),
	} {
		if got := addrOf(addr); got != netip.MustParseAddr("10.1.2.3") {
			t.Errorf("%v: %v", addr, got)
		}
	}
	if got := addrOf(&net.UnixAddr{Name: "x"}); got.IsValid() {
		t.Errorf("unix socket: %v", got)
	}
}

func TestNewServerRefuses(t *testing.T) {
	good := func() Options {
		return Options{Callers: newCallers(), Credentials: noCredentials{}, TokenKey: make([]byte, 32)}
	}
	if _, err := NewServer(good()); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Options){
		"no callers":     func(o *Options) { o.Callers = nil },
		"no credentials": func(o *Options) { o.Credentials = nil },
		"short key":      func(o *Options) { o.TokenKey = make([]byte, 31) },
		"path in addr":   func(o *Options) { o.MetadataAddr = "127.0.0.1/latest" },
		"user in addr":   func(o *Options) { o.MetadataAddr = "u@127.0.0.1" },
		"scheme in addr": func(o *Options) { o.MetadataAddr = "http://127.0.0.1" },
		"query in addr":  func(o *Options) { o.MetadataAddr = "127.0.0.1?x" },
		"space in addr":  func(o *Options) { o.MetadataAddr = "127.0.0.1 " },
	} {
		o := good()
		change(&o)
		if _, err := NewServer(o); err == nil {
			t.Error(name)
		}
	}
	for addr, want := range map[string]string{
		"169.254.169.254": "http://169.254.169.254", "127.0.0.1:1338": "http://127.0.0.1:1338", "fd00:ec2::254": "http://[fd00:ec2::254]",
		"[fd00:ec2::254]:80": "http://[fd00:ec2::254]:80", "metadata.example:80": "http://metadata.example:80",
	} {
		if u, err := newUpstream(addr, 1, nil); err != nil || u.base != want {
			t.Errorf("%s: %v, %v", addr, u, err)
		}
	}
}
