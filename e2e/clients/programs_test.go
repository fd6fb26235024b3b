package clients

import (
	"fmt"
	"net"
	"net/textproto"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// alone is a network namespace with nothing in it but the metadata addresses on lo.
type alone struct{ ns netns.NsHandle }

func newAlone() (*alone, error) {
	a := &alone{}
	err := onThread(func() (err error) {
		if a.ns, err = netns.New(); err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		for _, ip := range endpoints {
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}, Flags: unix.IFA_F_NODAD}
			if err := netlink.AddrAdd(lo, addr); err != nil {
				return fmt.Errorf("add %s: %w", ip, err)
			}
		}
		return nil
	})
	return a, err
}

func (a *alone) enter(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(a.ns); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// onThread calls f on a thread of its own, which ends with it: a thread that was moved to another
// namespace never runs anything else.
func onThread(f func() error) error {
	err := make(chan error)
	go func() {
		runtime.LockOSThread()
		err <- f()
	}()
	return <-err
}

// scripted runs one program against a script and returns what it said about each fetch and what was
// on the wire. The environment is that of a program which knows nothing about credentials, and env.
func scripted(t *testing.T, argv, env []string, fetches int, script func(string, string, textproto.MIMEHeader) answer) ([]result, []exchange, error) {
	a, err := newAlone()
	if err != nil {
		return nil, nil, err
	}
	defer a.ns.Close()
	var w *wire
	err = a.enter(func() (err error) {
		w, err = tap()
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	rs, err := func() (rs []result, err error) {
		for _, ip := range endpoints {
			var l net.Listener
			err := a.enter(func() (err error) {
				l, err = net.Listen("tcp", net.JoinHostPort(ip.String(), "80"))
				return err
			})
			if err != nil {
				return nil, err
			}
			defer l.Close()
			go serve(l, script)
		}
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Dir = t.TempDir()
		cmd.Env = append([]string{"PATH=/usr/bin:/bin", "HOME=" + cmd.Dir, "LANG=C.UTF-8", "PYTHONDONTWRITEBYTECODE=1", "AWS_REGION=us-east-1"}, env...)
		p, err := start(cmd, a.enter)
		if err != nil {
			return nil, err
		}
		r, err := p.next()
		for ; err == nil; r, err = p.again() {
			if rs = append(rs, r); len(rs) == fetches {
				return rs, p.end()
			}
		}
		return rs, err
	}()
	return rs, w.stop(), err
}

// TestPrograms proves each program, and the test's own eyes, against a scripted endpoint.
func TestPrograms(t *testing.T) {
	argv := programs(t)
	const list = "/latest/meta-data/iam/security-credentials/"
	change := func(target string, a answer) func(string, string, textproto.MIMEHeader) answer {
		return func(method, path string, h textproto.MIMEHeader) answer {
			if path == target {
				return a
			}
			return healthy(method, path, h)
		}
	}
	late := func(d time.Duration) func(string, string, textproto.MIMEHeader) answer {
		return func(method, path string, h textproto.MIMEHeader) answer {
			a := healthy(method, path, h)
			a.delay = d
			return a
		}
	}
	v2only := func(method, path string, h textproto.MIMEHeader) answer {
		if method == "GET" && h.Get("X-Aws-Ec2-Metadata-Token") == "" {
			return answer{status: 401, body: "no token"}
		}
		return healthy(method, path, h)
	}
	v6 := func(c client) bool { return c.v6 }
	all := func(client) bool { return true }
	never := func(client) bool { return false }
	for _, s := range []struct {
		name   string
		env    []string
		script func(string, string, textproto.MIMEHeader) answer
		who    func(client) bool
		ok     func(client) bool
	}{
		{name: "healthy", script: healthy, who: all, ok: all},
		{name: "IPv6", env: []string{"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6"}, script: healthy, who: v6, ok: all},
		{name: "v2 only", env: []string{"AWS_EC2_METADATA_V1_DISABLED=true"}, script: v2only, who: all, ok: func(c client) bool { return !c.v1 }},
		// One character more, and crt refuses the token.
		{name: "a session token of 64 characters", script: func(method, path string, h textproto.MIMEHeader) answer {
			a := healthy(method, path, h)
			if method == "PUT" {
				a.body = strings.Repeat("A", 64)
			}
			return a
		}, who: all, ok: all},
		{name: "every answer 300 ms late", script: late(300 * time.Millisecond), who: all, ok: all},
		{name: "list 404", script: change(list, answer{status: 404, body: "no role here"}), who: all, ok: never},
		{name: "list 403", script: change(list, answer{status: 403, body: "not allowed here"}), who: all, ok: never},
		{name: "list 503", script: change(list, answer{status: 503, header: "Retry-After: 1\r\n", body: "not yet here"}), who: all, ok: never},
	} {
		t.Run(s.name, func(t *testing.T) {
			forEach(t, s.who, func(c client) error {
				rs, seen, err := scripted(t, argv[c.name], s.env, 2, s.script)
				if err != nil {
					return err
				}
				for i, r := range rs {
					if err := expect(c, r, s.ok(c)); err != nil {
						return fmt.Errorf("fetch %d: %w; on the wire: %v", i+1, err, seen)
					}
					if r.OK && r.AccessKeyID != keyID {
						return fmt.Errorf("fetch %d: access key %s, want %s", i+1, r.AccessKeyID, keyID)
					}
				}
				if s.ok(c) {
					if err := answered(seen, 2); err != nil {
						return fmt.Errorf("%w; on the wire: %v", err, seen)
					}
				}
				t.Logf("%-9s %v s, %v s; %d requests %s", c.name, rs[0].Seconds, rs[1].Seconds, len(seen), rs[0].Error)
				return nil
			})
		})
	}

	// What must never happen to the daemon's clients does happen here, and is seen.
	t.Run("a hang is seen", func(t *testing.T) {
		script := change(list+role, answer{status: 200, body: `{"Code":"Failed","Message":"denied"}`})
		rs, _, err := scripted(t, argv["js-v2"], []string{"FETCH_TIMEOUT=2"}, 1, script)
		if len(rs) != 1 || rs[0].OK || !strings.HasPrefix(rs[0].Error, "hang") || !hung(err) {
			t.Fatalf("got %+v, %v; want a hang", rs, err)
		}
	})
	t.Run("an abort is seen", func(t *testing.T) {
		script := change(list+role, answer{status: 404, body: "not found"})
		rs, _, err := scripted(t, argv["crt"], nil, 1, script)
		if len(rs) != 0 || !aborted(err) {
			t.Fatalf("got %+v, %v; want an abort", rs, err)
		}
	})
	t.Run("a refresh that fails is seen", func(t *testing.T) {
		for _, c := range clients {
			var mu sync.Mutex
			lists := 0
			script := func(method, path string, h textproto.MIMEHeader) answer {
				mu.Lock()
				defer mu.Unlock()
				if path == list {
					if lists++; lists > 1 {
						return answer{status: 404, body: "no role here"}
					}
				}
				return healthy(method, path, h)
			}
			rs, seen, err := scripted(t, argv[c.name], nil, 2, script)
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			if answered(seen, 2) == nil {
				t.Errorf("%s: a failed second fetch passes for a good one: %+v, %v", c.name, rs, seen)
			}
		}
	})
}

// expect compares a fetch with what it should be.
func expect(c client, r result, ok bool) error {
	switch {
	case r.Client != c.name:
		return fmt.Errorf("a line of client %q", r.Client)
	case ok && (!r.OK || r.AccessKeyID == ""):
		return fmt.Errorf("no credentials: %s", r.Error)
	case !ok && (r.OK || r.AccessKeyID != ""):
		return fmt.Errorf("credentials %s, want none", r.AccessKeyID)
	case !ok && !regexp.MustCompile(c.none).MatchString(r.Error):
		return fmt.Errorf("error %q, want one that matches %s", r.Error, c.none)
	}
	return nil
}

// answered checks that so many credential documents were answered with 200: some clients keep old
// credentials, silently, when a refresh fails.
func answered(seen []exchange, want int) error {
	n := 0
	for _, e := range seen {
		if e.document() && e.status == "200" {
			n++
		}
	}
	if n != want {
		return fmt.Errorf("%d documents were answered with 200, want %d", n, want)
	}
	return nil
}

// forEach runs f for each client, four at a time, and fails the client's own sub-test by its error.
func forEach(t *testing.T, who func(client) bool, f func(client) error) {
	t.Helper()
	errs := make([]error, len(clients))
	parallel(4, len(clients), func(i int) {
		if who(clients[i]) {
			errs[i] = f(clients[i])
		}
	})
	for i, c := range clients {
		if who(c) {
			t.Run(c.name, func(t *testing.T) {
				if errs[i] != nil {
					t.Error(errs[i])
				}
			})
		}
	}
}

// parallel calls f for 0 to n-1, so many at a time.
func parallel(atATime, n int, f func(int)) {
	var g errgroup.Group
	g.SetLimit(atATime)
	for i := range n {
		g.Go(func() error {
			f(i)
			return nil
		})
	}
	_ = g.Wait()
}
