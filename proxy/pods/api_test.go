package pods

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
)

// apiServer behaves as an API server does towards this package, over real connections: list, watch with and without
// initial events, field selectors with their synthetic ADDED and DELETED, resource versions, expiry, bookmarks, TokenRequest,
// Events. Requests that it does not know fail the test.
type apiServer struct {
	t *testing.T
	*httptest.Server
	decoder runtime.Decoder

	mu        sync.Mutex
	changed   chan struct{} // closed and replaced whenever something happens
	rv        int
	objects   map[string]map[string]apiObject // resource → namespace/name
	history   []historic
	compacted int            // resource versions up to this have expired
	cut       chan struct{}  // closed to end all watches
	down      bool           // every request is answered 503
	refused   map[string]int // requests because of it, by resource
	holding   int            // requests that are not answered now
	abandoned int            // of them, ever: given up by the client
	watchList bool
	sloppy    bool            // field selectors and namespaces are ignored
	forbidden map[string]bool // "verb resource"
	held      map[string]bool // resources about which no request is answered
	open      map[string]int  // watches open now, by resource
	opened    map[string]int  // watches opened ever, and lists made, by "verb resource selector"
	tokens    []authenticationv1.TokenRequestSpec
	tokenFor  func(spec authenticationv1.TokenRequestSpec) (string, error)
	events    []corev1.Event
	writes    []string // of events: POST, PATCH
}

type apiObject interface {
	runtime.Object
	metav1.Object
}

type historic struct {
	rv       int
	resource string
	was, is  apiObject // nil: did not, does not exist; both: a bookmark
}

func newAPIServer(t *testing.T) *apiServer {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	scheme.AddKnownTypes(authenticationv1.SchemeGroupVersion, &authenticationv1.TokenRequest{})
	a := &apiServer{
		t: t, decoder: serializer.NewCodecFactory(scheme).UniversalDeserializer(),
		changed: make(chan struct{}), cut: make(chan struct{}), rv: 100, watchList: true,
		objects: map[string]map[string]apiObject{}, forbidden: map[string]bool{}, held: map[string]bool{}, refused: map[string]int{}, open: map[string]int{}, opened: map[string]int{},
		tokenFor: func(s authenticationv1.TokenRequestSpec) (string, error) {
			return "token of " + s.BoundObjectRef.Name, nil
		},
	}
	a.Server = httptest.NewServer(a)
	t.Cleanup(func() {
		a.disconnect()
		a.Close()
	})
	return a
}

func (a *apiServer) config() *rest.Config { return &rest.Config{Host: a.URL} }

// locked runs f and tells those who wait for something to happen.
func (a *apiServer) locked(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	close(a.changed)
	a.changed = make(chan struct{})
}

// wait returns when cond, called with the lock held, is true.
func (a *apiServer) wait(what string, cond func() bool) {
	a.t.Helper()
	end := deadline()
	for {
		a.mu.Lock()
		ok, changed := cond(), a.changed
		a.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-a.t.Context().Done():
			a.t.Fatal("test ended while waiting for: ", what)
		case <-end:
			a.t.Fatal("waited in vain for: ", what)
		}
	}
}

func kindOf(o apiObject) (resource, kind string) {
	switch o.(type) {
	case *corev1.Pod:
		return "pods", "Pod"
	case *corev1.ServiceAccount:
		return "serviceaccounts", "ServiceAccount"
	case *corev1.Namespace:
		return "namespaces", "Namespace"
	case *corev1.Node:
		return "nodes", "Node"
	}
	return "", ""
}

// put creates or updates objects.
func (a *apiServer) put(objects ...apiObject) {
	for _, o := range objects {
		resource, kind := kindOf(o)
		o = o.DeepCopyObject().(apiObject)
		o.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{Version: "v1", Kind: kind})
		a.locked(func() {
			a.rv++
			o.SetResourceVersion(strconv.Itoa(a.rv))
			if a.objects[resource] == nil {
				a.objects[resource] = map[string]apiObject{}
			}
			key := o.GetNamespace() + "/" + o.GetName()
			a.history = append(a.history, historic{a.rv, resource, a.objects[resource][key], o})
			a.objects[resource][key] = o
		})
	}
}

func (a *apiServer) delete(objects ...apiObject) {
	for _, o := range objects {
		resource, _ := kindOf(o)
		key := o.GetNamespace() + "/" + o.GetName()
		a.locked(func() {
			a.rv++
			a.history = append(a.history, historic{a.rv, resource, a.objects[resource][key], nil})
			delete(a.objects[resource], key)
		})
	}
}

// disconnect ends all watches.
func (a *apiServer) disconnect() {
	a.locked(func() {
		close(a.cut)
		a.cut = make(chan struct{})
	})
}

// bookmark tells all watches of a resource that nothing else has happened.
func (a *apiServer) bookmark(resource string) {
	a.locked(func() {
		a.rv++
		a.history = append(a.history, historic{rv: a.rv, resource: resource})
	})
}

// compact makes all resource versions so far too old to watch from.
func (a *apiServer) compact() { a.locked(func() { a.rv++; a.compacted = a.rv }) }

func (a *apiServer) set(f func()) { a.locked(f) }

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !strings.HasPrefix(r.URL.Path, "/api/v1/") {
		http.NotFound(w, r) // a client of somebody else, who had this port before
		return
	}
	path := strings.Split(strings.TrimPrefix(r.URL.Path, "/api/v1/"), "/")
	namespace := ""
	if path[0] == "namespaces" && len(path) > 2 {
		namespace, path = path[1], path[2:]
	}
	resource, q := path[0], r.URL.Query()
	selector := q.Get("fieldSelector")
	verb := map[string]string{"POST": "create", "PATCH": "patch", "GET": "list"}[r.Method]
	switch {
	case q.Get("watch") == "true":
		verb = "watch"
	case verb == "list" && len(path) == 2:
		verb = "get"
	}
	for held := true; held; {
		a.mu.Lock()
		var changed chan struct{}
		held, changed = a.held[resource], a.changed
		a.mu.Unlock()
		if held {
			a.locked(func() { a.holding++; changed = a.changed })
			gone := false
			select {
			case <-changed:
			case <-r.Context().Done():
				gone = true
			}
			a.mu.Lock()
			a.holding--
			if gone {
				a.abandoned++
			}
			a.mu.Unlock()
			if gone {
				return
			}
		}
	}
	a.mu.Lock()
	if a.sloppy {
		selector = ""
		if resource == "serviceaccounts" {
			namespace = ""
		}
	}
	down, forbidden := a.down, a.forbidden[verb+" "+resource]
	a.mu.Unlock()
	gr := schema.GroupResource{Resource: resource}
	switch {
	case down:
		a.locked(func() { a.refused[resource]++ })
		refuse(w, apierrors.NewServiceUnavailable("down"))
	case forbidden:
		a.locked(func() { a.opened[verb+" "+resource+" "+selector]++ })
		refuse(w, apierrors.NewForbidden(gr, "", fmt.Errorf("not by this user")))
	case verb == "list":
		a.list(w, resource, namespace, selector, q.Get("resourceVersion"))
	case verb == "watch":
		a.watch(w, r, resource, namespace, selector)
	case verb == "get" && resource == "nodes":
		a.mu.Lock()
		node := a.objects[resource]["/"+path[1]]
		a.mu.Unlock()
		if node == nil {
			refuse(w, apierrors.NewNotFound(gr, path[1]))
			return
		}
		respond(w, http.StatusOK, node)
	case verb == "patch" && resource == "nodes":
		a.patchTaints(w, r, path[1])
	case verb == "create" && resource == "serviceaccounts" && len(path) == 3 && path[2] == "token":
		a.token(w, r)
	case (verb == "create" || verb == "patch") && resource == "events":
		a.event(w, r, verb, path)
	default:
		a.t.Errorf("the API server got %s %s", r.Method, r.URL)
		refuse(w, apierrors.NewBadRequest("not expected"))
	}
}

func refuse(w http.ResponseWriter, err *apierrors.StatusError) {
	s := err.Status()
	s.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	respond(w, int(s.Code), s)
}

func respond(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}

// selects reports whether an object is in a list or watch.
func selects(o apiObject, namespace, selector string) bool {
	if o == nil || namespace != "" && o.GetNamespace() != namespace {
		return false
	}
	name, value, _ := strings.Cut(selector, "=")
	switch name {
	case "metadata.name":
		return o.GetName() == value
	case "spec.nodeName":
		return o.(*corev1.Pod).Spec.NodeName == value
	}
	return true
}

func (a *apiServer) selected(resource, namespace, selector string) []apiObject {
	items := []apiObject{}
	for _, o := range a.objects[resource] {
		if selects(o, namespace, selector) {
			items = append(items, o)
		}
	}
	return items
}

// list answers with the present, but where version 0 allows it from the past: there it knows pods alone.
func (a *apiServer) list(w http.ResponseWriter, resource, namespace, selector, version string) {
	var body map[string]any
	a.locked(func() {
		a.opened["list "+resource+" "+selector]++
		kind := map[string]string{"pods": "PodList", "serviceaccounts": "ServiceAccountList", "namespaces": "NamespaceList"}[resource]
		body = map[string]any{
			"kind": kind, "apiVersion": "v1", "metadata": map[string]any{"resourceVersion": strconv.Itoa(a.rv)},
			"items": a.selected(resource, namespace, selector),
		}
		if version == "0" && resource != "pods" {
			body["items"], body["metadata"] = []apiObject{}, map[string]any{"resourceVersion": "1"}
		}
	})
	respond(w, http.StatusOK, body)
}

func (a *apiServer) watch(w http.ResponseWriter, r *http.Request, resource, namespace, selector string) {
	q := r.URL.Query()
	initial := q.Get("sendInitialEvents") == "true"
	from, _ := strconv.Atoi(q.Get("resourceVersion"))
	a.mu.Lock()
	cut, watchList := a.cut, a.watchList
	a.mu.Unlock()
	if initial && !watchList {
		refuse(w, apierrors.NewInvalid(schema.GroupKind{Kind: "ListOptions"}, "", nil))
		return
	}
	flusher := w.(http.Flusher)
	w.Header().Set("Content-Type", "application/json")
	flusher.Flush()
	enc := json.NewEncoder(w)
	send := func(kind string, o any) {
		_ = enc.Encode(map[string]any{"type": kind, "object": o})
		flusher.Flush()
	}
	bookmark := func(rv int, initialEnd bool) {
		m := map[string]any{"resourceVersion": strconv.Itoa(rv)}
		if initialEnd {
			m["annotations"] = map[string]string{metav1.InitialEventsAnnotationKey: "true"}
		}
		kind := map[string]string{"pods": "Pod", "serviceaccounts": "ServiceAccount", "namespaces": "Namespace"}[resource]
		send("BOOKMARK", map[string]any{"kind": kind, "apiVersion": "v1", "metadata": m})
	}
	a.locked(func() { a.open[resource]++; a.opened["watch "+resource+" "+selector]++ })
	defer a.locked(func() { a.open[resource]-- })

	a.mu.Lock()
	expired := !initial && from < a.compacted
	next := slices.IndexFunc(a.history, func(h historic) bool { return h.rv > from })
	if initial || next < 0 {
		next = len(a.history)
	}
	var first []apiObject
	rv := a.rv
	if initial {
		first = a.selected(resource, namespace, selector)
	}
	a.mu.Unlock()
	if expired {
		s := apierrors.NewResourceExpired("too old").Status()
		s.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
		send("ERROR", s)
		return
	}
	for _, o := range first {
		send("ADDED", o)
	}
	if initial {
		bookmark(rv, true)
	}
	for {
		a.mu.Lock()
		events, changed := slices.Clone(a.history[next:]), a.changed
		next = len(a.history)
		a.mu.Unlock()
		for _, h := range events {
			if h.resource != resource {
				continue
			}
			was, is := selects(h.was, namespace, selector), selects(h.is, namespace, selector)
			switch {
			case h.was == nil && h.is == nil:
				bookmark(h.rv, false)
			case is && was:
				send("MODIFIED", h.is)
			case is:
				send("ADDED", h.is)
			case was:
				gone := h.was.DeepCopyObject().(apiObject)
				gone.SetResourceVersion(strconv.Itoa(h.rv))
				send("DELETED", gone)
			}
		}
		select {
		case <-changed:
		case <-cut:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// patchTaints applies the one JSON patch of nodes there is: a test, then a replacement.
func (a *apiServer) patchTaints(w http.ResponseWriter, r *http.Request, name string) {
	var ops []struct {
		Op, Path string
		Value    []corev1.Taint
	}
	if err := json.NewDecoder(r.Body).Decode(&ops); err != nil || len(ops) != 2 || ops[0].Op != "test" || ops[1].Op != "replace" || ops[1].Path != "/spec/taints" {
		a.t.Errorf("patch of node %s: %+v, %v", name, ops, err)
	}
	a.mu.Lock()
	node := a.objects["nodes"]["/"+name].DeepCopyObject().(*corev1.Node)
	a.mu.Unlock()
	if !slices.Equal(node.Spec.Taints, ops[0].Value) {
		refuse(w, apierrors.NewInvalid(schema.GroupKind{Kind: "Node"}, name, nil))
		return
	}
	node.Spec.Taints = ops[1].Value
	a.put(node)
	respond(w, http.StatusOK, node)
}

func (a *apiServer) token(w http.ResponseWriter, r *http.Request) {
	req := &authenticationv1.TokenRequest{}
	a.decode(r, req)
	a.mu.Lock()
	a.tokens = append(a.tokens, req.Spec)
	tokenFor := a.tokenFor
	a.mu.Unlock()
	token, err := tokenFor(req.Spec)
	if s, ok := errors.AsType[*apierrors.StatusError](err); ok {
		refuse(w, s)
		return
	}
	req.TypeMeta = metav1.TypeMeta{Kind: "TokenRequest", APIVersion: "authentication.k8s.io/v1"}
	req.Status.Token = token
	respond(w, http.StatusCreated, req)
}

func (a *apiServer) event(w http.ResponseWriter, r *http.Request, verb string, path []string) {
	var ev corev1.Event
	if verb == "create" {
		a.decode(r, &ev)
		a.locked(func() { a.events = append(a.events, ev); a.writes = append(a.writes, verb) })
	} else {
		body, _ := io.ReadAll(r.Body)
		a.locked(func() {
			a.writes = append(a.writes, verb)
			for i := range a.events {
				if a.events[i].Name == path[1] {
					_ = json.Unmarshal(body, &a.events[i])
					ev = a.events[i]
				}
			}
		})
		if ev.Name == "" {
			refuse(w, apierrors.NewNotFound(schema.GroupResource{Resource: "events"}, path[1]))
			return
		}
	}
	ev.TypeMeta = metav1.TypeMeta{Kind: "Event", APIVersion: "v1"}
	respond(w, http.StatusCreated, ev)
}

func (a *apiServer) decode(r *http.Request, into runtime.Object) {
	body, err := io.ReadAll(r.Body)
	if err == nil {
		_, _, err = a.decoder.Decode(body, nil, into)
	}
	if err != nil {
		a.t.Errorf("%s %s: %v", r.Method, r.URL, err)
	}
}
