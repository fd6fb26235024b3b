package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/version"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
	"github.com/imdsgate/imdsgate/e2e/scenarios/first"
	"github.com/imdsgate/imdsgate/e2e/scenarios/heir"
)

const (
	reuseWorkers   = 14 // as many as there are addresses: each is taken again as soon as it is free
	pluginsDir     = "/usr/lib/cni"
	reuseWithout   = 300 // pods, where the source is off
	reusePods      = 1000
	statusReporter = 1500 * time.Millisecond // longest delay of what the API server is told: 1.0 s was measured with 30 pods at once
)

// A thousand pods of two service accounts pass through a /28 of addresses. Their sandboxes are made and removed by the real CNI
// plugins bridge and host-local through the real libcni, as runtimes do; the API server hears of each step late, as it does
// from a busy kubelet, so that it goes on showing an address's last holder while the next one asks. Each pod asks as its first
// instruction and then tries what the last holder left. TestScenarioReuse does the same with real kubelets and fewer pods. It
// needs the whole machine, so no other test runs beside it.
func TestLabReuse(t *testing.T) {
	var u, without first.Reuse
	t.Cleanup(func() {
		if err := first.Write("out", func(r *first.Report) { r.SetReuse(u); r.SetReuse(without) }); err != nil {
			t.Error(err)
		}
	})
	t.Run("CNI results", func(t *testing.T) {
		t.Parallel()
		u = reuse(t, first.CNI, reusePods)
		if err := u.Check(); err != nil {
			t.Error(err)
		}
	})
	t.Run("API server alone", func(t *testing.T) {
		t.Parallel()
		without = reuse(t, first.Informer, reuseWithout)
	})
}

// reuse runs the pods on a node of their own and prints what came of it.
func reuse(t *testing.T, source string, pods int) first.Reuse {
	t.Helper()
	if _, err := os.Stat(filepath.Join(pluginsDir, "bridge")); err != nil {
		t.Fatalf("%v: apt-get install -y --no-install-recommends containernetworking-plugins", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	t.Cleanup(cancel)
	n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true, Network: lab.Bridge})
	flag := filepath.Join(n.Dir(), "cni", "results")
	if source == first.Informer {
		flag = ""
	}
	labtest.Daemon(t, n, "-issuer", "web-identity", "-cni-results", flag)
	shop := shared.Unique("shop")
	roles := []string{serviceAccount(t, n, shop, "red", "red"), serviceAccount(t, n, shop, "green", "green")}
	addresses := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(n.Index), 16}), 28)
	c, err := newSandboxes(n, addresses)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var all, reports sync.WaitGroup
	numbers := make(chan int)
	for range reuseWorkers {
		all.Go(func() {
			for i := range numbers {
				p := &reusePod{
					n: n, sandboxes: c, reports: &reports, dir: dir, seed: rand.New(rand.NewPCG(7, uint64(i))),
					object: &corev1.Pod{
						ObjectMeta: metav1.ObjectMeta{Namespace: shop, Name: "p" + strconv.Itoa(i)},
						Spec: corev1.PodSpec{
							NodeName: n.Name, ServiceAccountName: []string{"red", "green"}[i%2], Containers: []corev1.Container{{Name: "main", Image: "none"}},
						},
					},
				}
				if err := p.live(ctx); err != nil {
					t.Errorf("pod %d: %v", i, err)
				}
			}
		})
	}
	for i := range pods {
		select {
		case numbers <- i:
		case <-ctx.Done():
			t.Errorf("%d of %d pods in time", i, pods)
		}
	}
	close(numbers)
	all.Wait()
	reports.Wait()

	u := first.Reuse{Source: source, By: first.Plugins, Addresses: 14}
	results, err := filepath.Glob(filepath.Join(dir, "*.result"))
	if err != nil {
		t.Fatal(err)
	}
	var files []io.Reader
	for _, name := range results {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, strings.NewReader(string(b)))
	}
	if err := u.Count(io.MultiReader(files...), addresses, func(pod, key string) (bool, error) {
		i, err := strconv.Atoi(strings.TrimPrefix(pod, "p"))
		if err != nil {
			return false, err
		}
		o, ok := n.AWS.Owner(key)
		if !ok {
			return false, fmt.Errorf("access key %q was never issued", key)
		}
		return o.RoleARN == roles[i%2], nil
	}); err != nil {
		t.Fatal(err)
	}
	if u.Pods != pods {
		t.Errorf("%d of %d pods left a result", u.Pods, pods)
	}
	for _, line := range u.Lines() {
		fmt.Println("FIGURES TestLabReuse:", line)
	}
	labtest.Untouched(t, n, imds.Expected{})
	return u
}

// sandboxes makes them on a node as a runtime does: libcni runs the plugins and keeps their results.
type sandboxes struct {
	cni  *libcni.CNIConfig
	list *libcni.NetworkConfigList
}

func newSandboxes(n *lab.Node, addresses netip.Prefix) (*sandboxes, error) {
	ip := addresses.Addr().As4()
	at := func(last byte) string { return netip.AddrFrom4([4]byte{ip[0], ip[1], ip[2], last}).String() }
	list, err := libcni.ConfListFromBytes(fmt.Appendf(nil, `{"cniVersion":"0.4.0","name":"pods","plugins":[{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,
		"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"%s/24","rangeStart":%q,"rangeEnd":%q}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}`,
		filepath.Join(n.Dir(), "ipam"), at(0), at(ip[3]+1), at(ip[3]+14)))
	if err != nil {
		return nil, err
	}
	return &sandboxes{libcni.NewCNIConfigWithCacheDir([]string{pluginsDir}, filepath.Join(n.Dir(), "cni"), &onNode{n: n}), list}, nil
}

// onNode runs plugins in the node's network namespace.
type onNode struct {
	version.PluginDecoder
	n   *lab.Node
	raw invoke.RawExec
}

func (e *onNode) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) (out []byte, err error) {
	err = e.n.Net.Do(func() error {
		out, err = e.raw.ExecPlugin(ctx, path, stdin, env)
		return err
	})
	return out, err
}

func (e *onNode) FindInPath(plugin string, paths []string) (string, error) {
	return e.raw.FindInPath(plugin, paths)
}

// reusePod is one pod's life.
type reusePod struct {
	n         *lab.Node
	sandboxes *sandboxes
	object    *corev1.Pod
	reports   *sync.WaitGroup // to the API server that are still to be made
	dir       string
	seed      *rand.Rand
}

func (p *reusePod) live(ctx context.Context) error {
	created, err := shared.Kube.CoreV1().Pods(p.object.Namespace).Create(ctx, p.object, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	p.object = created
	started := metav1.Now()
	sandbox, err := shared.Sandbox()
	if err != nil {
		return err
	}
	defer sandbox.Remove()
	rt := &libcni.RuntimeConf{
		ContainerID: sandbox.Name, NetNS: sandbox.Path(), IfName: "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", created.Namespace},
			{"K8S_POD_NAME", created.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", sandbox.Name},
			{"K8S_POD_UID", string(created.UID)},
		},
	}
	result, err := p.sandboxes.cni.AddNetworkList(ctx, p.sandboxes.list, rt)
	for err != nil && strings.Contains(err.Error(), "no IP addresses available") { // the last holder's is freed by a plugin that still runs
		result, err = p.sandboxes.cni.AddNetworkList(ctx, p.sandboxes.list, rt)
	}
	if err != nil {
		return err
	}
	text, err := json.Marshal(result)
	if err != nil {
		return err
	}
	var is struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal(text, &is); err != nil {
		return err
	}
	ip := is.IPs[0].Address.Addr().String()
	status := corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}, StartTime: &started}
	running := make(chan error, 1)
	p.late(func() { running <- p.report(ctx, status) })
	err = heir.Pod{Name: created.Name, Inside: sandbox.Do}.Run(ctx, p.dir, time.Second)
	err = errors.Join(err, p.sandboxes.cni.DelNetworkList(ctx, p.sandboxes.list, rt))
	p.late(func() {
		if err := <-running; err != nil {
			return // it has been told of the end already, or the test ends
		}
		status.Phase = corev1.PodSucceeded
		_ = p.report(ctx, status)
	})
	return err
}

// late does something after a while.
func (p *reusePod) late(do func()) {
	p.reports.Add(1)
	time.AfterFunc(time.Duration(p.seed.Int64N(int64(statusReporter))), func() {
		defer p.reports.Done()
		do()
	})
}

func (p *reusePod) report(ctx context.Context, s corev1.PodStatus) error {
	patch, err := json.Marshal(map[string]any{"status": s})
	if err != nil {
		return err
	}
	_, err = shared.Kube.CoreV1().Pods(p.object.Namespace).Patch(ctx, p.object.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return err
}
