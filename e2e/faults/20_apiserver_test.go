package faults

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/util/retry"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/clustertest"
)

// reconnected is the longest that new pods wait after the API server is back: client-go's watches, kubelet's and the daemon's
// alike, try again after up to a minute, then the pod starts.
const reconnected = 75 * time.Second

// The API server is dead for a while. Nobody whom the daemon knows notices; afterwards it learns of new pods.
func TestFaultAPIServerDead(t *testing.T) {
	lasts := 30 * time.Second
	if shared.long {
		lasts = 10 * time.Minute
	}
	f := shared.fault(t, "API server dead", lasts+3*time.Minute, both, lasts)
	f.roleless()
	f.must(f.Kill(f.ctx, "kube-apiserver"))
	f.struck()
	f.lasts(lasts)
	f.must(f.StartControlPlane(f.ctx))
	f.over()
	f.giveRoles()
	f.newPods()
	f.done(expect{whole: reconnected})
}

// roleless makes a pod on each node whose service account has no role yet.
func (f *fault) roleless() {
	f.Helper()
	for _, node := range both {
		name := fmt.Sprintf("late%d-%d", node, time.Now().UnixMilli())
		role, err := f.Fabric.Role(f.ctx, "faults/"+name, aws.ActionListBuckets)
		f.must(err)
		f.must(f.ServiceAccount(f.ctx, namespace, name, nil))
		l, err := f.StartSteady(f.ctx, clustertest.SteadyPod{
			Namespace: namespace, Name: name, ServiceAccount: name, Role: role, Node: node, Workers: workers, Interval: interval,
		})
		f.must(err)
		f.Cleanup(func() { f.remove(l) })
		f.wait("pod "+name+" is told that it has no role", func() error {
			for _, r := range f.results(l) {
				if answer(r) == "404" {
					return nil
				}
			}
			return errors.New("it is not")
		})
		f.late = append(f.late, l)
	}
}

// giveRoles does so when the API server is back, and waits until the daemons have heard of it.
func (f *fault) giveRoles() {
	f.Helper()
	for _, l := range f.late {
		f.must(f.ServiceAccount(f.ctx, namespace, l.ServiceAccount, map[string]string{"eks.amazonaws.com/role-arn": l.Role}))
	}
	for _, l := range f.late {
		at := f.served(l, time.Time{})
		f.wholeAt(at)
		f.note("the daemon of node %d knew of a new annotation %.1f s after its end", l.Node, at.Sub(f.since).Seconds())
	}
}

// newPods waits until a new pod on each node is served: the daemons hear the API server.
func (f *fault) newPods() {
	f.Helper()
	for _, node := range both {
		var l *clustertest.Steady
		// A controller may lag behind its API server for a moment: the service account is not there yet.
		f.must(retry.OnError(retry.DefaultBackoff, apierrors.IsForbidden, func() (err error) {
			name := fmt.Sprintf("new%d-%d", node, time.Now().UnixMilli())
			l, err = f.load(f.ctx, name, node)
			return err
		}))
		f.Cleanup(func() { f.remove(l) })
		f.cold = append(f.cold, l)
		at := f.served(l, time.Time{})
		f.wholeAt(at)
		results := f.results(l)
		f.note("a new pod on node %d ran %.1f s after its end, when its kubelet had noticed, and was served %.1f s later", node,
			results[0].At.Sub(f.since).Seconds(), at.Sub(results[0].At).Seconds())
	}
}

// A daemon that was cut off for so long that the API server has forgotten where it was: 410 Gone. It lists anew.
func TestFaultWatchExpired(t *testing.T) {
	f := shared.fault(t, "watch expired (410)", 2*time.Minute, both)
	f.roleless()
	pods, err := f.Kube.CoreV1().Pods("").List(f.ctx, metav1.ListOptions{})
	f.must(err)
	f.must(f.Kill(f.ctx, "kube-apiserver"))
	f.struck()
	etcd := func(path, body string) []byte {
		t.Helper()
		out, err := f.ControlPlane(f.ctx, "curl", "-sSf", "-m5", "-XPOST", "-d", body, "http://127.0.0.1:2379/v3/kv/"+path)
		f.must(err)
		return []byte(out)
	}
	var head struct {
		Header struct {
			Revision int64 `json:",string"`
		}
	}
	// The daemon holds an older revision than any that is left: the key is nobody's.
	for range 5 {
		f.must(json.Unmarshal(etcd("put", `{"key":"ZmF1bHRz","value":"eA=="}`), &head))
	}
	etcd("compaction", fmt.Sprintf(`{"revision":"%d","physical":true}`, head.Header.Revision))
	f.must(f.StartControlPlane(f.ctx))
	f.over()
	w, err := f.Kube.CoreV1().Pods("").Watch(f.ctx, metav1.ListOptions{ResourceVersion: pods.ResourceVersion})
	if err == nil {
		e := <-w.ResultChan()
		w.Stop()
		if e.Type != watch.Error {
			t.Errorf("a watch from where the daemons were goes on: %s", e.Type)
		}
		err = apierrors.FromObject(e.Object)
	}
	if !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		t.Errorf("a watch from where the daemons were is answered %v, not 410", err)
	}
	f.note("revision %s answers %q", pods.ResourceVersion, strings.TrimSpace(fmt.Sprint(err)))
	f.giveRoles()
	f.newPods()
	f.done(expect{whole: reconnected})
}

func TestFaultEtcdRestarted(t *testing.T) {
	f := shared.fault(t, "etcd restarted", 2*time.Minute, both)
	f.roleless()
	f.must(f.Kill(f.ctx, "etcd"))
	f.struck()
	f.lasts(5 * time.Second)
	f.must(f.StartControlPlane(f.ctx))
	f.over()
	f.giveRoles()
	f.newPods()
	f.done(expect{whole: reconnected})
}
