/* SPDX-License-Identifier: MIT
 *
 * The one-page copy as Python calls it, without an object in between: exporting two buffers through
 * cffi costs four times what copying the page does. A second module in cffi's shared object, so that
 * there is one core with one handler; pykhuge/_native.py loads it.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "pykhuge.h"

enum { NOT_A_PAIR_OF_PAGES = -2 };

static int is_page(const Py_buffer *view)
{
	return view->len == PYKHUGE_PAGE_SIZE && (uintptr_t)view->buf % PYKHUGE_PAGE_SIZE == 0;
}

/* Two aligned pages overlap only when they are one. */
static int64_t copy(const Py_buffer *to, const Py_buffer *from, uint64_t bad_lines)
{
	int64_t result;
	if (!is_page(to) || !is_page(from) || to->buf == from->buf)
		return NOT_A_PAIR_OF_PAGES;
	Py_BEGIN_ALLOW_THREADS
	result = pykhuge_copy_mc_page(to->buf, from->buf, bad_lines);
	Py_END_ALLOW_THREADS
	return result;
}

static int64_t copy_objects(PyObject *to, PyObject *from, PyObject *bad_lines)
{
	int64_t result = NOT_A_PAIR_OF_PAGES;
	Py_buffer to_view, from_view;
	uint64_t word = PyLong_AsUnsignedLongLong(bad_lines);
	if (word == UINT64_MAX && PyErr_Occurred())
		return result;
	if (PyObject_GetBuffer(to, &to_view, PyBUF_WRITABLE) != 0)
		return result;
	if (PyObject_GetBuffer(from, &from_view, PyBUF_SIMPLE) == 0) {
		result = copy(&to_view, &from_view, word);
		PyBuffer_Release(&from_view);
	}
	PyBuffer_Release(&to_view);
	return result;
}

/* Exceptions on the way are dropped: the caller looks again, slowly, and says what is allowed. */
static PyObject *copy_mc_page(PyObject *module, PyObject *const *args, Py_ssize_t nr_args)
{
	int64_t result = nr_args == 3 ? copy_objects(args[0], args[1], args[2]) : NOT_A_PAIR_OF_PAGES;
	(void)module;
	if (result == NOT_A_PAIR_OF_PAGES)
		PyErr_Clear();
	return PyLong_FromLongLong(result);
}

static PyMethodDef methods[] = {
	{"copy_mc_page", (PyCFunction)(void (*)(void))copy_mc_page, METH_FASTCALL, NULL},
	{NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
#ifdef Py_GIL_DISABLED
	{Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
	{0, NULL},
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT, .m_name = "pykhuge._highpage", .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__highpage(void);
PyMODINIT_FUNC PyInit__highpage(void)
{
	return PyModuleDef_Init(&definition);
}
