package lab_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

var shared *lab.Lab

func TestMain(m *testing.M) {
	if os.Getenv("LAB_CRASH") != "" {
		crash()
	}
	os.Exit(labtest.Main(m, func(l *lab.Lab) { shared = l }))
}

// crash makes a lab with a node and a pod and does not close it.
func crash() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	l, err := lab.Start(ctx, lab.Options{})
	if err == nil {
		var n *lab.Node
		if n, err = l.AddNode(ctx, lab.NodeOptions{}); err == nil {
			_, err = n.AddPod(ctx, lab.PodSpec{})
		}
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	panic("with a lab running")
}

// A pod on a node without any lock reaches the endpoint, over TCP, UDP and ICMP, and the lab knows it: otherwise the
// assertions of every other test would hold for nothing.
func TestLabSeesWhatReachesTheEndpoint(t *testing.T) {
	for name, o := range map[string]lab.NodeOptions{
		"ptp": {}, "bridge": {Network: lab.Bridge}, "ptp strict rp_filter": {RPFilter: true}, "ptp v4 only": {IPv4Only: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			n := labtest.Node(t, shared, o)
			p := labtest.Pod(t, n, lab.PodSpec{})
			labtest.Untouched(t, n, imds.Expected{})
			for _, ip := range []string{"169.254.169.254", "[fd00:ec2::254]"} {
				if ip[0] == '[' && o.IPv4Only {
					continue
				}
				req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://"+ip+"/latest/api/token", nil)
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
				resp, err := p.HTTP().Do(req)
				if err != nil {
					t.Fatal(err)
				}
				token, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				req, _ = http.NewRequestWithContext(ctx, http.MethodGet, "http://"+ip+"/latest/user-data", nil)
				req.Header.Set("X-Aws-Ec2-Metadata-Token", string(token))
				if resp, err = p.HTTP().Do(req); err != nil {
					t.Fatal(err)
				}
				data, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				if !strings.Contains(string(data), imds.Mark) {
					t.Errorf("user-data is %q", data)
				}
				for _, network := range []string{"udp", "tcp"} {
					c, err := p.Dial(ctx, network, ip+":53")
					if err == nil {
						c.Write([]byte("x"))
						c.Close()
					}
				}
				if err := p.Ping(ctx, strings.Trim(ip, "[]")); err != nil {
					t.Errorf("ping %s: %v", ip, err)
				}
			}
			packets, err := shared.IMDS.Packets(ctx, p.IPs...)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]int{}
			for _, p := range packets {
				got[p.Protocol] += p.Count
			}
			if got["tcp"] < 5*len(p.IPs) || got["udp"] != len(p.IPs) || got["icmp"] < len(p.IPs) {
				t.Errorf("the capture knows of %v", packets)
			}
			if rs := shared.IMDS.Requests(p.IPs...); len(rs) != 2*len(p.IPs) {
				t.Errorf("the endpoint knows of %v", rs)
			}
			if err := n.Untouched(ctx, imds.Expected{}); err == nil {
				t.Error("the endpoint counts as untouched")
			}
		})
	}
}

// With EC2's own hop limit the answer to the token PUT ends at the node: the floor for what imdsgate does not cover.
func TestLabHopLimit(t *testing.T) {
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	p := labtest.Pod(t, n, lab.PodSpec{})
	shared.IMDS.SetHopLimit(1)
	defer shared.IMDS.SetHopLimit(2)
	put := func(client *http.Client, ip string) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://"+ip+"/latest/api/token", nil)
		if err != nil {
			return err
		}
		req.Header.Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
		resp, err := client.Do(req)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	host := labtest.Pod(t, n, lab.PodSpec{HostNetwork: true})
	for _, ip := range []string{"169.254.169.254", "[fd00:ec2::254]"} {
		if err := put(p.HTTP(), ip); err == nil {
			t.Errorf("an ordinary pod has a token of %s", ip)
		}
		if err := put(host.HTTP(), ip); err != nil {
			t.Errorf("a host network pod has no token of %s: %v", ip, err)
		}
	}
}

func TestLabRefusesTheMachinesNamespace(t *testing.T) {
	if err := lab.RunInMachineNamespace(func() error { t.Error("it ran"); return nil }); !errors.Is(err, lab.ErrMachineNamespace) {
		t.Errorf("the error is %v", err)
	}
}

// What a lab leaves when it is not even closed ends or is removed by its janitor.
func TestLabLeavesNothing(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	if _, err := exec.LookPath("pgrep"); err != nil {
		t.Fatalf("%v: apt-get install -y --no-install-recommends procps", err)
	}
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), "LAB_CRASH=1")
	out, _ := cmd.CombinedOutput()
	if !strings.Contains(string(out), "with a lab running") {
		t.Fatalf("the lab did not start: %s", out)
	}
	prefix := fmt.Sprintf("imdsgate-e2e-%d-", cmd.ProcessState.Pid())
	var left []string
	for ctx.Err() == nil {
		names, _ := filepath.Glob("/run/netns/" + prefix + "*")
		files, _ := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*"))
		processes, _ := exec.CommandContext(ctx, "pgrep", "-f", prefix).Output()
		if left = slices.Concat(names, files, strings.Fields(string(processes))); len(left) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond) // the janitor is nobody's child any more
	}
	t.Errorf("of a crashed lab are left: %v", left)
}
